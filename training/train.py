"""Train a retrieval model on a prepared dataset, on all workers of a Ray cluster.

The run's folder STORAGE/NAME gets config.yaml (a preset: pointing at it repeats the run), checkpoints, best/ and
result.json. Starting the same (run.name, run.storage) again resumes it; a finished one prints its result.
"""

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import ray.exceptions
from ray.train import CheckpointConfig, ControllerError, FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer

from common import config as configs
from common import logs, ray_address, shards, storage
from common.errors import ConfigError, NotFoundError, RunError, TryAgainError, exit_with, told
from common.shards import DatasetIndex
from training import tracking
from training.config import PATHS, PRESETS, TrainConfig
from training.data.loader import check_frames, sample_order
from training.driver import only_driver, with_driver
from training.failures import TellFailures, without_traceback
from training.start import check_model
from training.weights import best_url, run_url

log = logging.getLogger(__name__)


def train(config: TrainConfig, callbacks: Sequence[UserCallback] = (), parent: str | None = None) -> dict[str, float]:
    """Start or resume a run; returns its test metrics. Command line and Ray Tune both call this.

    Args:
        callbacks: Ray Train's, for Tune to see the reports.
        parent: id of the MLflow run that this one is a child of.

    Raises:
        ConfigError, DataError, StorageError, RunError: as one sentence.
    """
    config = with_absolute_paths(config)
    run = run_url(config)
    dataset, dataset_sha256 = shards.read_dataset(config.data.dataset)
    check(config, dataset)
    storage.check_writable(run)
    with only_driver(run):
        check_identity(config, run, dataset_sha256)
        finished = read_result(run)
        if finished is not None:
            log.info("run %s is finished; this is its result", run)
            return finished
        storage.publish_bytes(configs.dump(config).encode(), storage.join(run, "config.yaml"))
        return _fit(config, run, dataset_sha256, callbacks, parent)


def check(config: TrainConfig, dataset: DatasetIndex) -> None:
    """Refuse what can't be trained on the dataset, or at all.

    Raises:
        ConfigError, DataError, RunError: as one sentence.
    """
    for split in (*config.data.train, config.data.val, config.data.test):
        if split is not None:
            dataset.split(split)
    sample_order(config, dataset)
    check_frames(config, config.data.dataset, dataset, config.data.train[0], config.eval.views)
    check_model(config)


def _fit(
    config: TrainConfig, run: str, dataset_sha256: str, callbacks: Sequence[UserCallback], parent: str | None
) -> dict[str, float]:
    run_id = tracking.find_or_create(config, run, dataset_sha256, parent)
    metric_log = None
    if run_id is not None:
        metric_log = with_driver(tracking.MetricLog).remote(tracking.absolute_uri(config.tracking.uri), run_id)

    def worker(settings: dict[str, Any]) -> dict[str, Any]:
        # A closure travels by value: Ray's controller need not import the models, which takes it many seconds.
        from training.loop import train_loop

        try:
            with without_traceback():
                return train_loop(settings)
        except (ConfigError, RunError) as error:
            # Every rank meets it alike. Raised, it would only make Ray start the workers again, and again.
            return {"error": error}

    # Ray reads these in the driver; its 60 s for a start are too short for a cluster that has to grow first.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(config.workers.start_timeout_s))
    os.environ.setdefault("RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S", str(config.workers.timeout_s))
    sized = with_loaders(config)
    trainer = TorchTrainer(
        worker,  # type: ignore[arg-type]
        train_loop_config={"config": sized.model_dump(mode="json"), "metric_log": metric_log},
        scaling_config=scaling(config),
        torch_config=TorchConfig(timeout_s=config.workers.timeout_s),
        run_config=RunConfig(
            name=config.run.name,
            storage_path=storage.absolute(config.run.storage),
            checkpoint_config=CheckpointConfig(num_to_keep=config.checkpoint.keep),
            failure_config=FailureConfig(max_failures=config.workers.max_failures),
            callbacks=[*callbacks, TellFailures()],  # type: ignore[list-item]
        ),
    )
    try:
        result: dict[str, Any] = trainer.fit().return_value  # type: ignore[attr-defined]
        if "error" in result:
            raise result["error"]
    except Exception as error:
        if run_id is not None:
            tracking.finish(config, run_id, {}, failed=True)
        raise (told(error) or _of_the_controller(error)) from None
    storage.publish_bytes(json.dumps(result, indent=2).encode(), storage.join(run, "result.json"))
    if metric_log is not None and run_id is not None:
        waiting = ray.get(metric_log.flush.remote())
        if waiting:
            log.warning("%d metric values never reached MLflow", waiting)
        tracking.finish(config, run_id, {"best_checkpoint": best_url(run)})
    return result


def _of_the_controller(error: Exception) -> Exception:
    """Ray's controller keeps its list of checkpoints in the run's storage, and does not wait for it."""
    if isinstance(error, ControllerError):
        reason = str(error).strip().splitlines()[-1]
        return TryAgainError(f"Ray's controller failed ({reason}): start the same command again to go on")
    return error


def scaling(config: TrainConfig) -> ScalingConfig:
    """Ranks and what each asks for: one per GPU, else two on CPU; CPUs explicitly, for the decoding processes."""
    workers = with_loaders(config).workers  # Tune reserves by this too, before a trial sizes its own
    gpus = int(ray.cluster_resources().get("GPU", 0))
    use_gpu = uses_gpus(config)
    num_workers = workers.num_workers or (gpus if use_gpu else 2) or 1
    least = num_workers if isinstance(num_workers, int) else num_workers[0]
    cpus = workers.cpus_per_worker or (workers.loader_workers or 0) + 1
    resources = {"CPU": cpus, "GPU": workers.gpus_per_worker} if use_gpu else {"CPU": cpus}
    for name, needed in resources.items():
        there = ray.cluster_resources().get(name, 0)
        if least * needed > there and not workers.autoscale:
            raise ConfigError(
                f"workers.num_workers={least} with {needed:g} {name} each need {least * needed:g} {name}, "
                f"the cluster has {there:g}: lower workers.num_workers or workers.cpus_per_worker, "
                "or set workers.autoscale=true if the cluster grows"
            )
    elastic: Any = num_workers  # Ray's annotation lacks the pair
    return ScalingConfig(
        num_workers=elastic,
        use_gpu=use_gpu,
        resources_per_worker=resources,
        elastic_resize_monitor_interval_s=workers.resize_s,  # type: ignore[call-arg]
    )


def uses_gpus(config: TrainConfig) -> bool:
    return "GPU" in ray.cluster_resources() if config.workers.use_gpu is None else config.workers.use_gpu


def with_loaders(config: TrainConfig) -> TrainConfig:
    """`config` with as many decoding processes per rank as the nodes have CPUs for each of their GPUs, less one.

    No more than fit `cpus_per_worker`. A rank on CPUs computes for much longer than its batch takes to decode: one
    process is enough for it.

    Raises:
        ConfigError: no node with a GPU is there yet to go by.
    """
    workers = config.workers
    if workers.loader_workers is not None:
        return config
    processes = 1
    if uses_gpus(config):
        shares = [
            int(node["Resources"].get("CPU", 0) // node["Resources"]["GPU"])
            for node in ray.nodes()
            if node["Alive"] and node["Resources"].get("GPU", 0) >= 1
        ]
        if not shares and workers.autoscale:
            raise ConfigError(
                "workers.loader_workers=null goes by the CPUs per GPU of a node, and none with a GPU is there yet: "
                "give the number"
            )
        share = min(shares, default=2) if workers.cpus_per_worker is None else int(workers.cpus_per_worker)
        processes = min(max(share - 1, 1), MAX_LOADERS)
    return configs.apply(config, {"workers.loader_workers": processes})


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """`config` with local paths made absolute: Ray Train's workers run in another folder than the driver.

    Raises:
        ConfigError: a path is relative in a submitted job.
    """
    configs.refuse_relative_in_job(config, *PATHS)
    paths = {"run.storage": config.run.storage, "data.dataset": config.data.dataset, "data.cache": config.data.cache}
    if config.model.init_from is not None:
        paths["model.init_from"] = config.model.init_from
    changes = {key: storage.absolute(value) for key, value in paths.items()}
    for key, value in {"model.backbone": config.model.backbone, "model.pretrained": config.model.pretrained}.items():
        if value and not storage.is_s3(value) and Path(value).expanduser().is_file():
            changes[key] = storage.absolute(value)
    if config.tracking.artifacts is not None:
        changes["tracking.artifacts"] = storage.absolute(config.tracking.artifacts)
    return configs.apply(config, {**changes, "tracking.uri": tracking.absolute_uri(config.tracking.uri)})


def check_identity(config: TrainConfig, run: str, dataset_sha256: str) -> None:
    """Refuse to resume a run whose model, data, losses, optimiser or seed differ from the ones it began with."""
    url = storage.join(run, "identity.json")
    values = config.model_dump(mode="json")
    mine = {key: values[key] for key in ("model", "losses", "optim", "seed")}
    mine["data"] = {"sha256": dataset_sha256, **{k: v for k, v in values["data"].items() if k in ORDER_KEYS}}
    try:
        theirs = json.loads(storage.read(url))
    except NotFoundError:
        storage.publish_bytes(json.dumps(mine, indent=2).encode(), url, if_none_match=True)
        return
    differing = list(differences(mine, theirs, ""))
    if differing:
        raise RunError(
            f"run {run} began with another configuration ({'; '.join(differing)}): "
            "choose another run.name, or the old values"
        )


MAX_LOADERS = 16  # a rank's one main process has to collect what they make
ORDER_KEYS = ("train", "lanes", "shuffle_shards", "crop_scale", "flip")


def differences(mine: Any, theirs: Any, key: str) -> Iterator[str]:
    """What two trees of settings differ in, each as a part of a sentence."""
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        for name in sorted({*mine, *theirs}):
            yield from differences(mine.get(name), theirs.get(name), f"{key}.{name}" if key else name)
    elif mine != theirs:
        yield f"{key} was {json.dumps(theirs)}, is {json.dumps(mine)}"


def read_result(run: str) -> dict[str, float] | None:
    """The test metrics of a finished run, or None."""
    try:
        result: dict[str, float] = json.loads(storage.read(storage.join(run, "result.json")))
    except NotFoundError:
        return None
    return result


def connect() -> None:
    """Start or join Ray.

    The CPUs and GPUs of a run whose controller died are freed through the dashboard's State API. So the dashboard must
    be on, and every process must know which cluster is meant; else the next run waits for ever.

    Raises:
        RunError: there is no cluster at RAY_ADDRESS.
    """
    address = os.environ.get("RAY_ADDRESS")
    env = {"env_vars": {"RAY_ADDRESS": address}} if address else None
    dashboard = None if address else True
    with ray_address.checked():
        ray.init(runtime_env=env, include_dashboard=dashboard, log_to_driver=True, logging_level=logging.WARNING)


def main() -> int:
    config = configs.from_command_line(TrainConfig, PRESETS, "training.train")
    logs.setup()
    connect()
    result = train(config)
    print(json.dumps({"run": run_url(config), **result}, indent=2))
    return 0


if __name__ == "__main__":
    exit_with(main)
