"""Metrics of a finished run's best weights, over all workers of a Ray cluster.

    python -m training.evaluate RUN [data.test=SPLIT] [eval.views=1] ...

RUN is the run's folder (STORAGE/NAME); its config.yaml is the preset, and data.test names the split to evaluate.
"""

import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.train import RunConfig
from ray.train.torch import TorchTrainer, get_device

from common import config as configs
from common import logs, shards, storage
from common.errors import ConfigError, exit_with, told
from training import models
from training.config import PRESETS, TrainConfig
from training.data.loader import check_frames
from training.loop import test_metrics
from training.train import connect, scaling, with_absolute_paths, with_loaders
from training.weights import run_url


def evaluate_run(config: TrainConfig) -> dict[str, float]:
    """Test metrics of the run that `config` names. Raises RunError, DataError as one sentence."""
    config = with_loaders(with_absolute_paths(config))
    if config.data.test is None:
        raise ConfigError("data.test is null: give data.test=SPLIT")
    dataset, _ = shards.read_dataset(config.data.dataset)
    check_frames(config, config.data.dataset, dataset, config.data.test, config.eval.views)
    name = f"{config.data.test}-{time.strftime('%Y%m%d-%H%M%S')}"
    trainer = TorchTrainer(
        _worker,  # type: ignore[arg-type]
        train_loop_config=config.model_dump(mode="json"),
        scaling_config=scaling(config),
        run_config=RunConfig(name=name, storage_path=storage.join(run_url(config), "evaluations")),
    )
    try:
        result: dict[str, float] = trainer.fit().return_value  # type: ignore[attr-defined]
    except Exception as error:
        raise (told(error) or error) from None
    return result


def _worker(values: dict[str, Any]) -> dict[str, float]:
    config = TrainConfig.model_validate(values)
    logs.setup(ray.train.get_context().get_world_rank())
    device = get_device()
    model = models.build(config.model, load=False).to(device)
    return test_metrics(config, model, run_url(config), device, None)


def arguments(argv: Sequence[str]) -> list[str]:
    """The command line with RUN as preset, and as the place of the weights wherever it lay when it was trained."""
    if not argv or argv[0].startswith("-"):
        return list(argv)
    run = storage.absolute(argv[0].removesuffix("/config.yaml").rstrip("/"))
    folder, _, name = run.rpartition("/")
    return [storage.join(run, "config.yaml"), f"run.storage={folder}", f"run.name={name}", *argv[1:]]


def main() -> int:
    config = configs.from_command_line(TrainConfig, PRESETS, "training.evaluate", arguments(sys.argv[1:]))
    logs.setup()
    connect()
    print(json.dumps({"run": run_url(config), "split": config.data.test, **evaluate_run(config)}, indent=2))
    return 0


if __name__ == "__main__":
    exit_with(main)
