"""What a study makes of the cluster and of what its trials tell, without trials that train."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray import cloudpickle
from ray.tune.search import Searcher

from common.errors import DataError, RunError, StorageError, TryAgainError
from tests.tuning.trials import no_records, record, study
from training.config import TrainConfig
from tuning import trials
from tuning.stopping import is_behind
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
    fifths = started(tmp_path / "fifths", "overrides.workers.gpus_per_worker=0.2", "overrides.workers.use_gpu=true")
    assert room(fifths.base) == 5  # 1 // 0.2 is 4
    two = started(tmp_path / "two", "trials=9", "max_concurrent=2")
    assert [bool(two.next(str(i))) for i in range(3)] == [True, True, False]
    half = started(tmp_path / "gpu", "overrides.workers.gpus_per_worker=0.5", "overrides.workers.use_gpu=true")
    assert room(half.base) == 2


def test_repeated_reports_are_dropped_and_time_is_added_up(tmp_path: Path, cluster: dict[str, float]) -> None:
    """Ray Train starts workers again below Tune, and the loop's clock with them."""
    some = started(tmp_path, "trials=1")
    some.next("a")
    for step, began, loop_s, ranks in ((2, 1.0, 5.0, 2), (2, 2.0, 6.0, 1), (4, 2.0, 7.0, 1)):
        loop = {"loop_began": began, "loop_s": loop_s, "ranks": ranks}
        some.on_trial_result(None, tune_trial("a"), {"step": step, "rsum": 1.0 * step, **loop})
    [record] = some.records
    assert [(r["step"], r["rsum"], r["worker_s"]) for r in record.reports] == [(2, 2.0, 10.0), (4, 4.0, 17.0)]
    some.on_trial_result(None, tune_trial("a"), {"step": 5, "loop_began": 2.0, "loop_s": 12.0, "ranks": 1})
    assert len(record.reports) == 2 and record.worker_s == 22  # a checkpoint, no evaluation


def test_a_report_that_was_lost_is_read_from_best(tmp_path: Path, cluster: dict[str, float]) -> None:
    """Seen to fail without: a study killed between a trial's last report and its record left it without a metric."""
    some = started(tmp_path, "trials=1")
    some.next("a")
    some.on_trial_complete(None, tune_trial("a"), {"done": True})
    [record] = no_records(tmp_path)
    assert record.status == "finished" and record.metric(some.study) == 9.0 and record.step == 4
    assert some.next("b") == Searcher.FINISHED and some.is_over


def test_a_lost_report_between_others_stops_nobody_later(tmp_path: Path, cluster: dict[str, float]) -> None:
    """Ray's median rule asserts that what it would have stopped then reports no more.

    Seen to fail where the report got the time at which it was found, and with a hard stop.
    """
    space = "overrides.optim.steps=18"
    some = started(tmp_path, "trials=4", "scheduler=median", "grace_reports=2", space)
    for number in range(3):
        some.records.save(record(number, [90.0, 90.0, 90.0, 90.0]))
    one = record(3, [10.0, 9.0, 90.0, 95.0])
    lost = one.reports.pop(1)
    some._add_missing_report(one)  # best/ has step 4
    assert [r["step"] for r in one.reports] == [2, 4, 6, 8] and one.reports[1]["rsum"] == lost["rsum"] == 9.0
    assert one.reports[1]["time"] == one.reports[2]["time"]
    some.records.save(one)
    other = record(4, [80.0, 90.0, 91.0])
    some.records.save(other)
    assert not is_behind(some.study, some.base, other, some.records)


def test_a_model_that_cannot_be_built_fails_alone(tmp_path: Path, cluster: dict[str, float]) -> None:
    """And is not drawn again at each start. Seen to fail where the error left Tune's searcher."""
    layers = 'space={"model.cube_layers": {"choice": [[50, 60], [0, 1]]}}'
    some = started(tmp_path, "searcher=grid", "scheduler=none", "cost=gflops", "trials=null", layers)
    assert some.next("a")
    first, second = no_records(tmp_path)
    assert (first.status, second.status) == ("failed", "running") and "model.cube_layers=[50, 60]" in str(first.error)


def test_paths_of_the_space_are_those_of_the_user(
    tmp_path: Path, cluster: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune runs a trial in a folder of its own. Seen to fail where the trial made them absolute."""
    monkeypatch.chdir(tmp_path)
    some = started(tmp_path, 'space={"model.init_from": {"choice": ["runs/a"]}}')
    start = some.next("a")
    assert isinstance(start, dict)
    assert TrainConfig.model_validate_json(start["config"]).model.init_from == str(tmp_path / "runs/a")


def test_an_error_in_what_is_told_is_none_of_a_trial_that_ended(tmp_path: Path, cluster: dict[str, float]) -> None:
    """Tune takes one in `on_trial_complete` for one of the trial. Seen to fail: it had failed, with a result."""
    some = started(tmp_path, "trials=1", "max_failures=0")
    some.next("a")
    some.records.all[0].status = "finished"
    some.on_trial_error(None, tune_trial("a", StorageError("s3 is away"), tmp_path))
    [found] = no_records(tmp_path)
    assert (found.status, found.failures, found.error) == ("finished", 0, None)


@pytest.mark.parametrize(
    ("error", "statuses"),
    [
        (StorageError("s3 is away"), ["running", "running", "failed"]),
        (TryAgainError("another driver"), ["running", "running", "failed"]),
        (ValueError("a defect"), ["running", "running", "failed"]),
        (RunError("the loss is nan"), ["failed"]),
        (DataError("a shard is damaged"), ["failed"]),
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
