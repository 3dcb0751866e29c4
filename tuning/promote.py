"""Write the best trial of a finished study as a training preset.

    python -m tuning.promote STUDY preset=NAME [trial=ID] [folder=FOLDER]

STUDY is the study's folder (STORAGE/NAME). `python -m training.train NAME` then repeats the trial's configuration.
"""

import json
import sys
from pathlib import Path
from typing import Any

from common import config as configs
from common import logs, storage
from common.errors import AlreadyExistsError, ConfigError, NotFoundError, RunError, exit_with
from training.config import PRESETS, TrackingConfig, TrainConfig
from tuning.config import PromoteConfig

RESULT = "study.json"


def promote(config: PromoteConfig) -> Path:
    """Write the preset and return its path.

    Raises:
        RunError: no finished study there, or no such trial.
        ConfigError: the preset exists.
    """
    result = _read(config.study)
    trial = _trial(result, config)
    settings = configs.load(TrainConfig, storage.join(trial["run"], "config.yaml"))
    # Where a trial was written and tracked is the study's business, not the preset's.
    run = {"name": config.preset, "storage": "runs"}
    settings = configs.apply(settings, {"run": run, "tracking": TrackingConfig().model_dump(mode="json")})
    path = Path(config.folder or PRESETS).expanduser() / f"{config.preset}.yaml"
    try:
        storage.publish_bytes((_header(result, trial) + configs.dump(settings)).encode(), str(path), if_none_match=True)
    except AlreadyExistsError:
        raise ConfigError(f"preset={config.preset}: {path} already exists, choose another name") from None
    return path


def _read(study: str) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(storage.read(storage.join(study, RESULT)))
    except NotFoundError:
        raise RunError(
            f"{study} is not the folder of a finished study: no {RESULT} in it; run the study to its end"
        ) from None
    return result


def _trial(result: dict[str, Any], config: PromoteConfig) -> dict[str, Any]:
    trials = {t["trial"]: t for t in result["trials"] if t["status"] != "failed"}
    name = config.trial or result["best"]["trial"]
    if name not in trials:
        raise RunError(f"trial={name} is not one of {', '.join(trials)} that study {result['study']} finished")
    chosen: dict[str, Any] = trials[name]
    return chosen


def _header(result: dict[str, Any], trial: dict[str, Any]) -> str:
    values = "  ".join(f"{key}={json.dumps(value)}" for key, value in trial["values"].items())
    return (
        f"# Trial {trial['trial']} of study {result['study']}: val {result['metric']} {trial['metric']:.4g}, "
        f"one of {len(result['trials'])} trials.\n"
        f"# Sampled: {values}\n"
        f"# Dataset: {result['dataset']} (dataset.json sha256 {result['dataset_sha256']})\n"
    )


def main() -> int:
    usage = "python -m tuning.promote STUDY preset=NAME [trial=ID] [folder=FOLDER]"
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print(f"{usage}\n\n{(__doc__ or '').strip()}\n\n{configs.describe(PromoteConfig)}")
        return 0
    if not arguments:
        raise ConfigError(f"no study given: {usage}")
    logs.setup()
    first = arguments[0] if arguments[0].startswith("study=") else f"study={json.dumps(arguments[0])}"
    config = configs.validate(PromoteConfig, configs.parse_overrides([first, *arguments[1:]]))
    path = promote(config)
    print(f"{path}\npython -m training.train {path.stem if config.folder is None else path}")
    return 0


if __name__ == "__main__":
    exit_with(main)
