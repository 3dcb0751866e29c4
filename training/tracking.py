"""MLflow: one run per training run, across restarts, written by one small actor that the driver owns.

Workers never talk to MLflow. An outage is a warning: metrics wait in the actor, and training goes on.
"""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import ray

from common import config as configs
from common import storage
from common.errors import NotFoundError
from common.logs import RateLimited
from training.config import TrainConfig

log = logging.getLogger(__name__)
RECORD = "mlflow_run.json"
LOCAL_SERVER = "http://127.0.0.1:5000"
MAX_WAITING = 100_000


def absolute_uri(uri: str) -> str:
    """A local sqlite file or folder made absolute; a server's address as it is."""
    if uri.startswith("sqlite:///"):
        return "sqlite:///" + str(Path(uri.removeprefix("sqlite:///")).expanduser().absolute())
    return uri if "://" in uri else str(Path(uri).expanduser().absolute())


def is_local(uri: str) -> bool:
    return uri.startswith(("sqlite:", "file:")) or "://" not in uri


def find_or_create(config: TrainConfig, run: str, dataset_sha256: str, parent: str | None) -> str | None:
    """The id of the MLflow run that belongs to the run folder, created at its first start. None in an outage.

    A key that the folder keeps is written before the run is created and is a tag of it, so a driver that is killed in
    between does not leave a run behind that nobody finds again.
    """
    uri = absolute_uri(config.tracking.uri)
    url = storage.join(run, RECORD)
    record: dict[str, Any] = {"uri": uri, "key": os.urandom(8).hex(), "run_id": None}
    try:
        there = json.loads(storage.read(url))
        if there["uri"] == uri:
            record |= there
        else:
            log.warning("this run was tracked at %s before; it goes on at %s", there["uri"], uri)
    except NotFoundError:
        pass
    if record["run_id"] is not None:
        return str(record["run_id"])
    storage.publish_bytes(json.dumps(record).encode(), url)
    tags = {"run": run, "run_key": record["key"], "dataset": config.data.dataset, "dataset_sha256": dataset_sha256}
    if parent:
        tags["mlflow.parentRunId"] = parent
    try:
        record["run_id"] = _find_or_create(config, uri, tags)
    except Exception as error:  # MLflow raises whatever its store, HTTP client or database raises
        log.warning("MLflow at %s can't be reached, this run is not tracked: %s", uri, str(error).splitlines()[0])
        return None
    storage.publish_bytes(json.dumps(record).encode(), url)
    return str(record["run_id"])


def _find_or_create(config: TrainConfig, uri: str, tags: dict[str, str]) -> str:
    from mlflow.entities import Param

    client = _client(uri)
    experiment_id = _experiment(config, client, uri)
    found = client.search_runs([experiment_id], f"tags.run_key = '{tags['run_key']}'")
    run = found[0] if found else client.create_run(experiment_id, run_name=config.run.name, tags=tags)
    values = _flat(config.model_dump(mode="json"))
    params = [Param(key, value) for key, value in values.items() if key not in run.data.params]
    for start in range(0, len(params), 100):  # MLflow's limit per call
        client.log_batch(run.info.run_id, params=params[start : start + 100])
    client.log_text(run.info.run_id, configs.dump(config), "config.yaml")
    return str(run.info.run_id)


def _experiment(config: TrainConfig, client: Any, uri: str) -> str:
    name, artifacts = config.tracking.experiment, config.tracking.artifacts
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return str(experiment.experiment_id)
    if artifacts is None and is_local(uri):
        artifacts = str(Path(uri.removeprefix("sqlite:///")).parent / "mlruns")
    return str(client.create_experiment(name, artifact_location=artifacts and storage.absolute(artifacts)))


def finish(config: TrainConfig, run_id: str, tags: dict[str, str], failed: bool = False) -> None:
    """Set final tags (the checkpoint's URL) and, unless it is there, the run's status. An outage is a warning."""
    set_tags(config, run_id, tags)
    status = "FAILED" if failed else "FINISHED"
    try:
        client = _client(absolute_uri(config.tracking.uri))
        if client.get_run(run_id).info.status != status:
            client.set_terminated(run_id, status)
    except Exception as error:
        log.warning("MLflow was not told that the run ended: %s", str(error).splitlines()[0])


def set_tags(config: TrainConfig, run_id: str, tags: dict[str, str]) -> None:
    """Tag a run, whether it is over or not. An outage is a warning."""
    try:
        client = _client(absolute_uri(config.tracking.uri))
        for key, value in tags.items():
            client.set_tag(run_id, key, value)
    except Exception as error:
        log.warning("MLflow did not take the tags %s: %s", ", ".join(tags), str(error).splitlines()[0])


def set_metrics(config: TrainConfig, run_id: str, metrics: dict[str, float]) -> None:
    """Set values that belong to a run as a whole; what is there already is not logged again. An outage is a warning."""
    try:
        client = _client(absolute_uri(config.tracking.uri))
        there = client.get_run(run_id).data.metrics
        for key, value in metrics.items():
            if there.get(key) != value:
                client.log_metric(run_id, key, value)
    except Exception as error:
        log.warning("MLflow did not take %s: %s", ", ".join(metrics), str(error).splitlines()[0])


def log_artifact(run: str, path: Path) -> str | None:
    """Attach a local file to the MLflow run of a run folder, and say where that run is seen. None in an outage.

    The page of a local store is in the server of `make mlflow`.
    """
    try:
        record = json.loads(storage.read(storage.join(run, RECORD)))
        client = _client(record["uri"])
        client.log_artifact(record["run_id"], str(path))
        experiment = client.get_run(record["run_id"]).info.experiment_id
    except Exception as error:
        log.warning("MLflow did not take %s: %s", path.name, str(error).splitlines()[0])
        return None
    server = LOCAL_SERVER if is_local(record["uri"]) else record["uri"]
    return f"{server}/#/experiments/{experiment}/runs/{record['run_id']}"


@ray.remote(num_cpus=0)
class MetricLog:
    """Logs metrics by run id. A step that a restarted worker repeats is dropped, by name and step."""

    def __init__(self, uri: str, run_id: str) -> None:
        # The default of seven retries with backoff would hold every later step back for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        self.client, self.run_id = _client(uri), run_id
        self.logged: dict[str, set[int]] = {}
        self.reached: int | None = None
        self.waiting: dict[tuple[str, int], tuple[float, int]] = {}  # name and step → value and time
        self.warn = RateLimited(logging.getLogger(__name__))

    def log(self, metrics: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        for name, value in metrics.items():
            self.waiting.setdefault((name, step), (value, now))
        if len(self.waiting) > MAX_WAITING:
            self.warn.warning(f"MLflow is out for too long: the oldest of more than {MAX_WAITING} values are dropped")
            self.waiting = dict(list(self.waiting.items())[-MAX_WAITING:])
        self.flush()

    def reach(self, step: int) -> None:
        """Note that a step is done."""
        self.reached = step

    def lost_since(self, step: int) -> int:
        """How many steps after `step` were done before this start, and are lost.

        Without an earlier start under this driver it is counted from the last step that MLflow knows.
        """
        if self.reached is None:
            try:
                self.reached = max(self._steps("train/loss"), default=0)
            except Exception as error:
                self.warn.warning(f"MLflow does not tell the last step: {str(error).splitlines()[0]}")
        return max((self.reached or 0) - step, 0)

    def flush(self) -> int:
        """Send what waits; returns how many values still wait."""
        from mlflow.entities import Metric

        try:
            waiting = [key for key in self.waiting if key[1] not in self._steps(key[0])]
            self.waiting = {key: self.waiting[key] for key in waiting}
            for start in range(0, len(waiting), 1000):  # MLflow's limit per call
                part = waiting[start : start + 1000]
                rows = [Metric(name, *self.waiting[name, step], step) for name, step in part]
                self.client.log_batch(self.run_id, metrics=rows)
                for name, step in part:
                    self._steps(name).add(step)
                    del self.waiting[name, step]
        except Exception as error:
            self.warn.warning(f"MLflow is out, {len(self.waiting)} values wait: {str(error).splitlines()[0]}")
        return len(self.waiting)

    def _steps(self, name: str) -> set[int]:
        """The steps logged under a name, also by an earlier start of this run.

        All of them, not the last one: Ray sends the call that a killed actor held again after those behind it.
        """
        if name not in self.logged:
            history = self.client.get_metric_history(self.run_id, name)
            self.logged[name] = {metric.step for metric in history}
        return self.logged[name]


def _client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return mlflow.MlflowClient(tracking_uri=uri)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys; MLflow's limit is 6,000 characters a value."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = (value if isinstance(value, str) else json.dumps(value))[:6000]
    return flat
