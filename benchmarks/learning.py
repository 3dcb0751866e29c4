"""What every method learns in equally many steps, over seeds: on the moving shapes, or any other dataset.

    python -m benchmarks.learning dataset=URL [folder=FOLDER] [rows=["mean pooling", ...]] [seeds=[0,1,2]]
        [key.path=value of training ...]

One row after the other in this one process, without Ray: the arithmetic is that of training/loop.py on one rank, and
what is measured are the last weights, so nothing is selected. Each row becomes a run FOLDER/ROW-SEED (config.yaml,
best/ with its metrics), so a finished one is read, not trained again, and other commands can use it. `rows` may be
a group: methods, or ablation (the rows of Prompt Switch's paper).

A method whose backbone is frozen starts from the weights of `mean pooling` of the same seed: on random weights it would
have nothing to work with. Its peer is `mean pooling, twice`, which trains as many steps more from there.
"""

import json
import logging
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from common import config as configs
from common import logs, shards, storage
from common.config import apply, parse_overrides
from common.errors import ConfigError, exit_with
from training import metrics, models, optim, weights
from training.config import PRESETS, TrainConfig
from training.data.loader import eval_loader, open_cache, train_loader
from training.encode import evaluate
from training.intervals import over_runs
from training.loop import MAX_LOGIT_SCALE, token_weights
from training.models import Retriever
from training.models.clip import Clip
from training.step import accumulate
from training.train import check_identity, read_result

log = logging.getLogger(__name__)
CONFIDENCE = 0.95
METRICS = {"r1": ("R@1", ".1f"), "r5": ("R@5", ".1f"), "order": ("order score", ".3f")}


class Row(NamedTuple):
    """What a row changes in the preset, and the row whose weights its CLIP starts from."""

    changes: dict[str, Any]
    start: str | None = None


NO_CAPTION = {"model.captioner": None, "losses.caption": 0}
XPOOL = {"name": "xpool"}


def method(name: str, **model: Any) -> dict[str, Any]:
    """Another method's model in the preset, on the same backbone and frames; prompts start as large as the cube."""
    return {"losses.caption": 0, "model": {"name": name, "backbone": "tiny", "num_frames": 6, **model}}


def vop(**model: Any) -> dict[str, Any]:
    return method("vop", prompt_init_std=0.3, **model)


ABLATION = {
    "mean pooling": Row({**NO_CAPTION, "model.cube": False, "model.switch": "off", "model.aggregation": False}),
    "+ cube": Row({**NO_CAPTION, "model.switch": "off", "model.aggregation": False}),
    "+ switch": Row({**NO_CAPTION, "model.aggregation": False}),
    "+ aggregation": Row(NO_CAPTION),
    "+ caption": Row({}),
}
METHODS = {
    "mean pooling": ABLATION["mean pooling"],
    "Prompt Switch": ABLATION["+ caption"],
    "seqTransf": Row(method("seq_transf", temporal={"layers": 2})),
    "token shift (CLS)": Row(method("token_shift", shift="cls")),
    "token shift (patches)": Row(method("token_shift", shift="patches", div=7, last_layers=2)),
    "CLIP-ViP": Row(method("clip_vip", proxy_init_std=0.3)),
    "mean pooling, twice": Row(ABLATION["mean pooling"].changes, "mean pooling"),
    "VoP": Row(vop(), "mean pooling"),
    "VoP^P": Row(vop(specific="position"), "mean pooling"),
    "VoP^C": Row(vop(specific="context"), "mean pooling"),
    "VoP^F": Row(vop(joint_layers=1), "mean pooling"),
    "VoP^F+P": Row(vop(joint_layers=1, specific="position"), "mean pooling"),
    "VoP^F+C": Row(vop(joint_layers=1, specific="context"), "mean pooling"),
    "VoP^F+C, CLIP trained too": Row(vop(joint_layers=1, specific="context", freeze_backbone=False)),
    "X-Pool": Row(method("mean_pool", scorer=XPOOL)),
    "Prompt Switch + X-Pool": Row({"model.scorer": XPOOL}),
    "TS2-Net": Row(method("ts2net", temporal={"layers": 2}, scorer={"name": "ts2net"})),
    "X-CLIP": Row(method("seq_transf", temporal={"layers": 2}, max_tokens=32, scorer={"name": "xclip"})),
}
GROUPS = {"ablation": ABLATION, "methods": METHODS}
ROWS = {**ABLATION, **METHODS}


def main() -> int:
    logs.setup()
    values = parse_overrides(sys.argv[1:])
    if "dataset" not in values:
        raise ConfigError("no dataset given: python -m benchmarks.learning dataset=URL (built by datasets_prep.build)")
    dataset, folder = values.pop("dataset"), values.pop("folder", "data/bench-learning")
    seeds, names = values.pop("seeds", [0, 1, 2]), rows_of(values.pop("rows", "methods"))
    base = configs.load(TrainConfig, "moving_shapes", [f"data.dataset={dataset}", f"run.storage={folder}"], PRESETS)
    found: dict[tuple[str, int], dict[str, float]] = {}
    for seed in seeds:
        for name in names:
            found[name, seed] = result(base, name, seed, values)
    print(table(found, names, seeds))
    return 0


def rows_of(chosen: str | list[str]) -> list[str]:
    """The names of the rows that an argument means."""
    names = list(GROUPS.get(chosen, [chosen])) if isinstance(chosen, str) else chosen
    for name in names:
        if name not in ROWS:
            raise ConfigError(f"rows: {name!r} is none of {', '.join(ROWS)}, nor one of {', '.join(GROUPS)}")
    return names


def result(base: TrainConfig, name: str, seed: int, values: Mapping[str, Any]) -> dict[str, float]:
    """The test metrics of a row's run, which is trained now unless it is finished.

    Raises:
        RunError: it was trained with other values.
    """
    config = apply(base, {**ROWS[name].changes, **values, "seed": seed, "run.name": run_name(name, seed)})
    run = weights.run_url(config)
    check_identity(config, run, shards.read_dataset(config.data.dataset)[1])
    if (scores := read_result(run)) is not None:
        return scores
    clip = None
    if (start := ROWS[name].start) is not None:
        result(base, start, seed, values)
        clip = weights.load_run(storage.join(config.run.storage, run_name(start, seed)))[1].clip
    began = time.process_time()
    model = trained(config, clip)
    scores = tested(config, model)
    storage.publish_bytes(configs.dump(config).encode(), storage.join(run, "config.yaml"))
    weights.save_best(run, model, config.optim.steps, scores)
    storage.publish_bytes(json.dumps(scores, indent=2).encode(), storage.join(run, "result.json"))
    cpu_s = time.process_time() - began
    told = ", ".join(f"{title} {scores[key]:{form}}" for key, (title, form) in METRICS.items() if key in scores)
    log.info("%s, seed %d: %s (%.0f s of CPU)", name, seed, told, cpu_s)
    return scores


def run_name(row: str, seed: int) -> str:
    """A run's name: the row's letters and digits."""
    return f"{re.sub('[^a-z0-9]+', '-', row.lower().replace('+', ' plus ')).strip('-')}-{seed}"


def trained(config: TrainConfig, clip: Clip | None) -> Retriever:
    """A model after all its steps; `clip`: the towers to start from, None = random ones."""
    torch.set_num_threads(config.workers.threads)
    torch.manual_seed(config.seed)
    model = models.build(config.model, clip)
    optimizer = optim.build(model, config.optim)
    weights_V = token_weights(config, model)
    dataset, sha256 = shards.read_dataset(config.data.dataset)
    for step, batch in enumerate(train_loader(config, dataset, open_cache(config, sha256), 0, 0, 1)):
        torch.manual_seed(optim.seed_of(config.seed, step))
        optim.set_lr(optimizer, config.optim, step)
        optimizer.zero_grad()
        counts = [len(batch.frames_BFCHW)]
        # One piece on one rank: DDP has nothing to add.
        towers: Any = model.towers
        accumulate(towers, batch.frames_BFCHW, batch.tokens_BL, config.losses, weights_V, counts, model=model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        optimizer.step()
        model.clip.logit_scale.data.clamp_(max=math.log(MAX_LOGIT_SCALE))
    return model


def tested(config: TrainConfig, model: Retriever) -> dict[str, float]:
    dataset, sha256 = shards.read_dataset(config.data.dataset)
    assert config.data.test is not None
    batches = eval_loader(config, dataset, open_cache(config, sha256), config.data.test, 0, 1)
    return evaluate(model, batches, models.tokenize(config.model), config.eval, torch.device("cpu"))


def table(found: Mapping[tuple[str, int], dict[str, float]], names: Sequence[str], seeds: Sequence[int]) -> str:
    """Markdown: a row per method, mean ± half of Student's 95 % interval over the seeds."""
    any_scores = next(iter(found.values()))
    shown = {key: form for key, form in METRICS.items() if key in any_scores}
    lines = [f"| | {' | '.join(title for title, _ in shown.values())} |", "| --- |" + " --- |" * len(shown)]
    for name in names:
        cells = [interval([found[name, seed][key] for seed in seeds], form) for key, (_, form) in shown.items()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    chance = metrics.chance(int(any_scores["num_videos"]))
    of_chance = {"r1": chance, "r5": 5 * chance, "order": 0.5}
    lines.append(f"| chance | {' | '.join(f'{of_chance[key]:{form}}' for key, (_, form) in shown.items())} |")
    return "\n".join(lines)


def interval(values: Sequence[float], form: str) -> str:
    if len(values) == 1:
        return f"{values[0]:{form}}"
    middle, (_, high) = over_runs(values, CONFIDENCE)
    return f"{middle:{form}} ± {high - middle:{form}}"


if __name__ == "__main__":
    exit_with(main)
