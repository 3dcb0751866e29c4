"""A study's tags in a real MLflow store, whenever its driver is killed."""

from pathlib import Path

from mlflow import MlflowClient

from common import config as configs
from tests.tuning.trials import no_records, record, study
from training.tracking import find_or_create
from tuning import tracking


def test_a_trial_whose_end_was_not_told_is_told_later(tmp_path: Path) -> None:
    """The study was killed between a trial's record and its tags. Seen to fail where the end sets only `best`."""
    settings, base = study(f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}")
    client, records = MlflowClient(base.tracking.uri), no_records(tmp_path)
    parent = find_or_create(base, str(tmp_path), "0" * 64, None)
    for number, status in enumerate(("finished", "stopped", "running")):
        trial = record(number, [1.0, 2.0], status)
        trial.run = str(tmp_path / f"trial-{number}")
        records.save(trial)
        run = configs.apply(base, {"run.name": f"trial-{number}"})
        assert find_or_create(run, trial.run, "0" * 64, parent)
    ends = []
    for _ in range(2):  # the second time nothing changes
        tracking.study_ended(settings, base, parent, records, records.all[:1], is_over=False)
        runs = {run.info.run_name: run for run in client.search_runs(["1"])}
        told = [runs[f"trial-{number}"] for number in range(3)]
        assert [run.data.tags.get("trial") for run in told] == ["0000", "0001", None]
        assert [run.data.tags.get("status") for run in told] == ["finished", "stopped", None]
        assert [run.data.tags["best"] for run in told] == ["true", "false", "false"]
        assert len(client.get_metric_history(told[0].info.run_id, "study/worker_s")) == 1
        ends.append([run.info.end_time for run in told])
    assert ends[0] == ends[1]
    assert [end is None for end in ends[0]] == [True, False, True]  # a finished one is ended by its own driver
