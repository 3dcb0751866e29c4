"""The paper's ablation rows on the moving shapes: mean pooling, + cube, + switch, + aggregation, + caption.

    python -m benchmarks.ablation dataset=URL [storage=URL] [seeds=[0,1,2]] [key.path=value of training ...]

Trains each row with each seed by training.train (one worker each, as many at once as the cluster has CPUs) and prints
R@1 and order score on the test split, mean and range over seeds, beside chance and the order-blind ceiling. A row that
is finished is read, not trained again.
"""

import json
import sys
from statistics import mean
from typing import Any

import ray

from common import config as configs
from common import logs
from common.config import apply, parse_overrides
from common.errors import ConfigError, exit_with
from training import metrics
from training.config import PRESETS, TrainConfig
from training.train import connect, train, with_absolute_paths

NO_CAPTION = {"model.captioner": None, "losses.caption": 0}
ROWS: dict[str, dict[str, Any]] = {
    "mean pooling": {**NO_CAPTION, "model.cube": False, "model.switch": "off", "model.aggregation": False},
    "+ cube": {**NO_CAPTION, "model.switch": "off", "model.aggregation": False},
    "+ switch": {**NO_CAPTION, "model.aggregation": False},
    "+ aggregation": NO_CAPTION,
    "+ caption": {},
}


def main() -> int:
    values = parse_overrides(sys.argv[1:])
    if "dataset" not in values:
        raise ConfigError("no dataset given: python -m benchmarks.ablation dataset=URL (built by moving_shapes)")
    dataset, storage = values.pop("dataset"), values.pop("storage", "runs/ablation")
    seeds = values.pop("seeds", [0, 1, 2])
    base = configs.load(TrainConfig, "moving_shapes", [f"data.dataset={dataset}", f"run.storage={storage}"], PRESETS)
    base = apply(base, {"workers.num_workers": 1, "tracking.experiment": "ablation", **values})
    base = with_absolute_paths(base)  # a Ray task has a working folder of its own
    logs.setup()
    connect()
    trial = ray.remote(num_cpus=0, max_retries=0)(_train)
    waiting = [(row, seed) for seed in seeds for row in ROWS]
    limit = int(ray.cluster_resources()["CPU"] // (base.workers.cpus_per_worker or 1))
    running: dict[Any, tuple[str, int]] = {}
    results: dict[tuple[str, int], dict[str, float]] = {}
    while waiting or running:
        while waiting and len(running) < limit:
            row, seed = waiting.pop(0)
            name = f"{row.replace('+ ', 'plus-').replace(' ', '-')}-{seed}"
            config = apply(base, {**ROWS[row], "seed": seed, "run.name": name})
            running[trial.remote(config.model_dump(mode="json"))] = (row, seed)
        done, _ = ray.wait(list(running))
        key = running.pop(done[0])
        results[key] = ray.get(done[0])
        print(f"{key[0]}, seed {key[1]}: {json.dumps(results[key])}", flush=True)
    print(table(results, seeds))
    return 0


def _train(values: dict[str, Any]) -> dict[str, float]:
    logs.setup()
    return train(TrainConfig.model_validate(values))


def table(results: dict[tuple[str, int], dict[str, float]], seeds: list[int]) -> str:
    """Markdown: a row per model, mean [lowest, highest] over seeds."""
    lines = ["| model | R@1 | R@5 | order score |", "| --- | --- | --- | --- |"]
    for row in ROWS:
        cells = []
        for key, form in (("r1", ".1f"), ("r5", ".1f"), ("order", ".3f")):
            found = [results[row, seed][key] for seed in seeds]
            cells.append(f"{mean(found):{form}} [{min(found):{form}}, {max(found):{form}}]")
        lines.append(f"| {row} | {' | '.join(cells)} |")
    videos = int(next(iter(results.values()))["num_videos"])
    chance = metrics.chance(videos)
    lines.append(f"| chance | {chance:.1f} | {5 * chance:.1f} | 0.500 |")
    lines.append("| order-blind ceiling | | | 0.500 |")
    return "\n".join(lines)


if __name__ == "__main__":
    exit_with(main)
