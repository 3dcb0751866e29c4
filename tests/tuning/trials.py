"""Studies and their records without Ray: trials as they would have gone."""

from collections.abc import Iterable
from pathlib import Path

from common import config as configs
from training.config import TrainConfig
from tuning.config import STUDIES, StudyConfig
from tuning.records import Record, Records, Status
from tuning.space import resolve


def study(*overrides: str) -> tuple[StudyConfig, TrainConfig]:
    loaded = configs.load(StudyConfig, "tiny", overrides, STUDIES)
    return loaded, resolve(loaded)


def no_records(folder: Path) -> Records:
    return Records(str(folder))


def record(
    number: int, metrics: Iterable[float], status: Status = "finished", cost: float = 0.0, **values: object
) -> Record:
    """A trial that was evaluated every second step, as the preset says."""
    keys = {key.replace("__", "."): value for key, value in values.items()}
    reports = [
        {"step": 2 * i, "rsum": metric, "time": 10.0 * i + number, "worker_s": 3.0 * i}
        for i, metric in enumerate(metrics, start=1)
    ]
    spent = 3.0 * len(reports)
    return Record(number, keys, f"runs/{number}", cost, status, reports, worker_s=spent, seconds=2 * spent)
