"""What a study makes of the cluster and of what its trials tell, without trials that train."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.tune.search import Searcher

from common.errors import RunError, StorageError, TryAgainError
from tests.tuning.trials import no_records, study
from tuning import trials
from tuning.trials import Trials, room


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What Ray says that there is; room for four trials."""
    there = {"CPU": 4.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: there)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": there}])
    monkeypatch.setattr(trials, "read_result", lambda run: {"r1": 1.0})
    monkeypatch.setattr(trials, "best_scores", lambda run: (4, {"rsum": 9.0}))
    monkeypatch.setattr(trials.tracking, "trial_ended", lambda *_: None)
    return there


def started(folder: Path, *overrides: str) -> Trials:
    settings, base = study("overrides.workers.num_workers=1", *overrides)
    return Trials(settings, base, no_records(folder))


def tune_trial(name: str, error: Exception | None = None, folder: Path | None = None) -> Any:
    path = None
    if error is not None and folder is not None:
        path = folder / f"{name}.pkl"
        path.write_bytes(cloudpickle.dumps(error))
    return SimpleNamespace(trial_id=name, pickled_error_file=path)


def test_as_many_at_once_as_fit(tmp_path: Path, cluster: dict[str, float]) -> None:
    """And no more are asked for than the cluster holds after it lost nodes; one always."""
    some = started(tmp_path, "trials=9")
    assert [bool(some.next(str(i))) for i in range(5)] == [True] * 4 + [False]
    cluster["CPU"] = 0.0
    assert room(some.base) == 1
    cluster["CPU"], cluster["GPU"] = 8.0, 1.0
    half = started(tmp_path / "gpu", "overrides.workers.gpus_per_worker=0.5", "overrides.workers.use_gpu=true")
    assert room(half.base) == 2


def test_repeated_reports_are_dropped_and_time_is_added_up(tmp_path: Path, cluster: dict[str, float]) -> None:
    """Ray Train starts workers again below Tune, and the loop's clock with them."""
    some = started(tmp_path, "trials=1")
    some.next("a")
    for step, loop_s, ranks in ((2, 5.0, 2), (2, 3.0, 1), (4, 4.0, 1)):
        some.on_trial_result(
            None, tune_trial("a"), {"step": step, "loop_s": loop_s, "ranks": ranks, "rsum": 1.0 * step}
        )
    [record] = some.records
    assert [(r["step"], r["rsum"], r["worker_s"]) for r in record.reports] == [(2, 2.0, 10.0), (4, 4.0, 14.0)]
    some.on_trial_result(None, tune_trial("a"), {"step": 5, "loop_s": 9.0, "ranks": 1})  # a checkpoint, no evaluation
    assert len(record.reports) == 2 and record.worker_s == 19


def test_a_report_that_was_lost_is_read_from_best(tmp_path: Path, cluster: dict[str, float]) -> None:
    """Seen to fail without: a study killed between a trial's last report and its record left it without a metric."""
    some = started(tmp_path, "trials=1")
    some.next("a")
    some.on_trial_complete(None, tune_trial("a"), {"done": True})
    [record] = no_records(tmp_path)
    assert record.status == "finished" and record.metric(some.study) == 9.0 and record.step == 4
    assert some.next("b") == Searcher.FINISHED and some.is_over


@pytest.mark.parametrize(
    ("error", "statuses"),
    [
        (StorageError("s3 is away"), ["running", "running", "failed"]),
        (TryAgainError("another driver"), ["running", "running", "failed"]),
        (ValueError("a defect"), ["running", "running", "failed"]),
        (RunError("the loss is nan"), ["failed"]),
    ],
)
def test_failures_are_tried_again_up_to_a_bound(
    tmp_path: Path, cluster: dict[str, float], error: Exception, statuses: list[str]
) -> None:
    """But not what would fail alike. Seen to fail where each start counted anew."""
    found = []
    for i in range(len(statuses)):
        some = started(tmp_path, "trials=1")  # as after a kill: from the records
        assert some.next(str(i))
        some.on_trial_error(None, tune_trial(str(i), error, tmp_path))
        found.append(some.records.all[0].status)
    assert found == statuses
    again = started(tmp_path, "trials=1")
    assert again.next("x") == Searcher.FINISHED
    assert again.records.all[0].error == str(error)
