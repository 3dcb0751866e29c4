"""Metrics in a real MLflow store: each step once, also after an outage or a restart."""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import pytest

from common import config as configs
from common import storage
from common.errors import DataError, StorageError
from training import tracking
from training.checkpoint import _read, _upload, _within
from training.config import PRESETS, TrainConfig

MetricLog: Any = tracking.MetricLog.__ray_metadata__.modified_class  # type: ignore[attr-defined]  # without its actor


@pytest.fixture
def client(tmp_path: Path) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")


@pytest.fixture
def run_id(client: mlflow.MlflowClient, tmp_path: Path) -> str:
    experiment = client.create_experiment("tests", artifact_location=str(tmp_path))
    return str(client.create_run(experiment).info.run_id)


def losses(client: mlflow.MlflowClient, run_id: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run_id, "train/loss")]


def test_values_wait_while_mlflow_is_down(client: mlflow.MlflowClient, run_id: str, monkeypatch: pytest.MonkeyPatch):
    """Seen to fail where `flush` empties `waiting` whatever happens."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    metric_log = MetricLog("http://127.0.0.1:9", run_id)
    metric_log.log({"train/loss": 2.0}, 1)
    assert metric_log.flush() == 1
    metric_log.client = client  # it is back
    metric_log.log({"train/loss": 1.0}, 2)
    assert metric_log.flush() == 0
    assert losses(client, run_id) == [(1, 2.0), (2, 1.0)]


def test_a_restart_logs_no_step_twice_and_tells_what_was_lost(client: mlflow.MlflowClient, run_id: str, tmp_path: Path):
    """Seen to fail without the look at MLflow's history."""
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    before = MetricLog(uri, run_id)
    for step in (1, 2, 3):
        before.log({"train/loss": 4.0 - step}, step)
    assert before.lost_since(3) == 0
    before.reach(5)
    assert before.lost_since(3) == 2
    after = MetricLog(uri, run_id)  # of another driver
    assert after.lost_since(1) == 2
    after.log({"train/loss": 9.0}, 2)
    after.log({"train/loss": 0.0}, 4)
    assert losses(client, run_id) == [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.0)]


def test_calls_out_of_order_lose_no_step(client: mlflow.MlflowClient, run_id: str, tmp_path: Path):
    """Ray sends a killed actor's call after those behind it. Seen to fail where only the last step counts."""
    metric_log = MetricLog(f"sqlite:///{tmp_path / 'mlflow.db'}", run_id)
    for step in (1, 3, 2):
        metric_log.log({"train/loss": 4.0 - step}, step)
    assert sorted(losses(client, run_id)) == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_a_step_repeated_in_an_outage_is_logged_once(
    client: mlflow.MlflowClient, run_id: str, monkeypatch: pytest.MonkeyPatch
):
    """Seen to fail where what waits is a list."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    metric_log = MetricLog("http://127.0.0.1:9", run_id)
    metric_log.log({"train/loss": 2.0}, 1)
    metric_log.log({"train/loss": 1.0}, 1)
    metric_log.client = client
    assert metric_log.flush() == 0
    assert losses(client, run_id) == [(1, 2.0)]


def test_a_driver_killed_while_it_creates_its_run_finds_it_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Between MLflow's run and the folder's record of it. Seen to fail where no key is written before."""
    config = configs.load(TrainConfig, "tiny", [f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}"], PRESETS)
    client, folder = mlflow.MlflowClient(config.tracking.uri), str(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, "log_batch", lambda *args, **kwargs: sys.exit("killed"))
        with pytest.raises(SystemExit):
            tracking.find_or_create(config, folder, "0" * 64, None)
    run_id = tracking.find_or_create(config, folder, "0" * 64, None)
    assert [run.info.run_id for run in client.search_runs(["1"])] == [run_id]
    assert client.get_run(run_id).data.params["seed"] == "0"
    assert tracking.find_or_create(config, folder, "0" * 64, None) == run_id
    assert tracking.find_or_create(config, folder + "-again", "0" * 64, None) != run_id


def test_an_upload_that_hangs_is_given_up():
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"of x did not end within checkpoint.upload_timeout_s=0.2: raise it"):
        _within(0.2, lambda: time.sleep(300), "the upload of x")
    assert time.monotonic() - began < 200
    with pytest.raises(KeyError):  # what the upload itself raises
        _within(100, lambda: {}["x"], "the upload of x")


def test_a_checkpoints_upload_has_a_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Seen to fail where the upload waits as long as it takes."""
    (tmp_path / "state.pt").touch()
    monkeypatch.setattr(storage, "publish", lambda path, url: time.sleep(60))
    checkpoint: Any = SimpleNamespace(path=tmp_path)
    with pytest.raises(StorageError, match=r"the upload of s3://x/checkpoint_7 did not end within"):
        _upload("s3://x", 0.2, checkpoint, "checkpoint_7")


def test_half_a_checkpoint_is_not_whole(tmp_path: Path):
    """Seen to fail where the sum is not asked for."""
    storage.publish_bytes(b"", f"{tmp_path}/checkpoint_7/state.pt")
    with pytest.raises(DataError, match="checkpoint checkpoint_7 is not whole"):
        _read(str(tmp_path), "checkpoint_7")
