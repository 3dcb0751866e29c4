"""Write the best trial of a study as a training preset.

    python -m tuning.promote STUDY preset=NAME [trial=NUMBER] [folder=FOLDER] [--confirm K]

STUDY is the study's folder (STORAGE/NAME). `python -m training.train NAME` then repeats the trial's configuration. With
--confirm, K runs with other seeds come first, as a study of their own beside the trials, and the preset tells how they
ended: the best of many trials is also the luckiest. The same command goes on with runs that were cut off.
"""

import json
import sys
from pathlib import Path
from typing import Any

from common import config as configs
from common import logs, storage
from common.errors import AlreadyExistsError, ConfigError, NotFoundError, RunError, exit_with
from training.config import PRESETS, DataConfig, TrackingConfig, TrainConfig, WorkerConfig
from tuning.config import MAX_SEEDS, SIZES, Domain, PromoteConfig, StudyConfig

RESULT = "study.json"
USAGE = "python -m tuning.promote STUDY preset=NAME [trial=NUMBER] [folder=FOLDER] [--confirm K]"


def promote(config: PromoteConfig) -> Path:
    """Write the preset and return its path.

    Raises:
        RunError: no study there, no such trial, or its repetitions failed.
        ConfigError: the preset exists.
    """
    path = Path(config.folder or PRESETS).expanduser() / f"{config.preset}.yaml"
    exists = ConfigError(f"preset={config.preset}: {path} already exists, choose another name")
    if path.exists():
        raise exists
    result = _read(config.study)
    trial = _trial(result, config)
    settings = configs.load(TrainConfig, storage.join(trial["run"], "config.yaml"))
    header = _header(result, trial)
    if config.confirm:
        header += confirmed(config, result, trial, settings)
    changes = {  # where and on what a trial ran is the study's business, not the preset's
        "run": {"name": config.preset, "storage": "runs"},
        "workers": {**result["workers"], **WorkerConfig().model_dump(mode="json", include=set(SIZES))},
        "tracking": TrackingConfig().model_dump(mode="json"),
        "data.cache": DataConfig.model_fields["cache"].default,
        **{key: value for key, value in trial["values"].items() if key.startswith("workers.")},
    }
    settings = configs.apply(settings, changes)
    try:
        storage.publish_bytes((header + configs.dump(settings)).encode(), str(path), if_none_match=True)
    except AlreadyExistsError:
        raise exists from None
    return path


def confirmed(config: PromoteConfig, result: dict[str, Any], trial: dict[str, Any], settings: TrainConfig) -> str:
    """Train the trial's configuration with other seeds; the line about it for the preset's header.

    Raises:
        RunError: not even two of the runs finished.
    """
    from tuning.study import run  # only here is Ray needed

    assert config.confirm is not None
    study = StudyConfig(
        name=f"{result['study']}-{trial['number']:04d}-seeds",
        storage=config.study,
        base=storage.join(trial["run"], "config.yaml"),
        overrides={
            "checkpoint.every": settings.checkpoint.every,
            "eval.select": settings.eval.select,
            "workers": result["workers"],  # the trial's own would wait for a cluster to grow
        },
        space={"seed": [Domain(choice=[settings.seed + 1 + i for i in range(MAX_SEEDS)])]},
        trials=config.confirm,  # a later call may ask for more
        searcher="grid",
        metric=result["metric"],
        mode=result["mode"],
        tracking=settings.tracking,
    )
    trials = [t for t in run(study)["trials"] if t["status"] == "finished"]
    if len(trials) < 2:
        raise RunError(f"{len(trials)} of {config.confirm} runs of study {study.name} finished: see its study.html")
    val = interval([t["metric"] for t in trials])
    ends = [json.loads(storage.read(storage.join(t["run"], "result.json"))) for t in trials]
    test = interval([end[result["metric"]] for end in ends])
    split = "test" if settings.data.test else "val"
    line = f"Confirmed with {len(trials)} other seeds: val {result['metric']} {val}, at the end {split} {test}"
    print(f"{line}; trial {trial['number']} itself: val {trial['metric']:.4g}", flush=True)
    return f"# {line} (mean and 95 % interval of it).\n"


def interval(values: list[float]) -> str:
    """Mean over seeds, and its 95 % interval."""
    from training.intervals import over_runs  # numpy and torch

    mean, (low, high) = over_runs(values, 0.95)
    return f"{mean:.4g} [{low:.4g}, {high:.4g}]"


def _read(study: str) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(storage.read(storage.join(study, RESULT)))
    except NotFoundError:
        raise RunError(f"{study} is not the folder of a study that ended: no {RESULT} in it") from None
    return result


def _trial(result: dict[str, Any], config: PromoteConfig) -> dict[str, Any]:
    trials = {t["number"]: t for t in result["trials"] if t["status"] != "failed" and t["metric"] is not None}
    number = next(iter(result["best"]), None) if config.trial is None else config.trial
    if number not in trials:
        known = ", ".join(map(str, trials)) or "none"
        raise RunError(f"trial={number} has no result in study {result['study']}; those that have: {known}")
    chosen: dict[str, Any] = trials[number]
    return chosen


def _header(result: dict[str, Any], trial: dict[str, Any]) -> str:
    values = "  ".join(f"{key}={json.dumps(value)}" for key, value in trial["values"].items())
    cost = f", {trial['cost']:.4g} {result['cost']} a video" if result["cost"] else ""
    return (
        f"# Trial {trial['number']} of study {result['study']}, {trial['status']} at step "
        f"{trial['reports'][-1]['step']}: val {result['metric']} {trial['metric']:.4g}{cost}, "
        f"one of {len(result['trials'])} trials.\n"
        f"# Sampled: {values}\n"
        f"# Dataset: {result['dataset']} (dataset.json sha256 {result['dataset_sha256']})\n"
    )


def main() -> int:
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print(f"{USAGE}\n\n{(__doc__ or '').strip()}\n\n{configs.describe(PromoteConfig)}")
        return 0
    if not arguments:
        raise ConfigError(f"no study given: {USAGE}")
    logs.setup()
    first, *rest = arguments
    if "--confirm" in rest:
        at = rest.index("--confirm")
        rest[at : at + 2] = [f"confirm={''.join(rest[at + 1 : at + 2])}"]
    first = first if first.startswith("study=") else f"study={json.dumps(first)}"
    config = configs.validate(PromoteConfig, configs.parse_overrides([first, *rest]))
    path = promote(config)
    print(f"{path}\npython -m training.train {path.stem if config.folder is None else path}")
    return 0


if __name__ == "__main__":
    exit_with(main)
