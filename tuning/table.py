"""The study on the terminal: its trials, the best one first, shown again as they change."""

import json
import time
from typing import Any

from ray.tune import Callback

from common import logs
from training.config import TrainConfig
from tuning.config import StudyConfig
from tuning.records import Record, Records, ranked
from tuning.space import trial_config

EVERY_S = 20.0
ROWS = 20  # shown while the study runs; all of them at its end


class LiveTable(Callback):
    """Prints the table when something has changed, at most every `EVERY_S` seconds."""

    def __init__(self, study: StudyConfig, base: TrainConfig, records: Records) -> None:
        self.study, self.base, self.records = study, base, records
        self.shown, self.shown_at = "", 0.0

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        now = time.monotonic()
        if now - self.shown_at < EVERY_S:
            return
        text = table(self.study, self.base, self.records, ROWS)
        if text != self.shown:
            print(text, flush=True)
            self.shown = text
        self.shown_at = now


def table(study: StudyConfig, base: TrainConfig, records: Records, rows: int | None = None) -> str:
    """The trials with status, steps, best metric, cost, values and the reason of a failure, below a line of counts."""
    best = ranked(study, records)
    order = [*best, *(record for record in records if record not in best)]
    second = f"{study.cost:>10}" if study.cost else ""
    lines = [
        counts(study, base, records),
        f"{'trial':<7}{'status':<10}{'step':>7}{'val ' + study.metric:>12}{second}  values",
    ]
    for record in order[:rows]:
        metric = record.metric(study)
        cells = f"{record.name:<7}{record.status:<10}{record.step:>7}{'-' if metric is None else f'{metric:.4g}':>12}"
        cells += f"{record.cost:>10.4g}" if study.cost else ""
        lines.append(f"{cells}  {values_of(record)}  {record.error or ''}".rstrip())
    if len(lines) - 2 < len(order):
        lines.append(f"... and {len(order) - len(lines) + 2} more")
    return "\n".join(lines)


def counts(study: StudyConfig, base: TrainConfig, records: Records) -> str:
    """How many trials there are of each kind, what they took, and what stopping early saved."""
    kinds = [record.status for record in records]
    parts = [f"{kinds.count(kind)} {kind}" for kind in ("finished", "stopped", "failed", "running") if kind in kinds]
    of = f" of {study.trials}" if study.trials else ""
    spent = logs.duration(sum(record.worker_s for record in records))
    saved = logs.duration(saved_s(study, base, records))
    return (
        f"study {study.name}: {len(records)}{of} trials ({', '.join(parts)}), workers {spent}, stopping saved {saved}"
    )


def saved_s(study: StudyConfig, base: TrainConfig, records: Records) -> float:
    """Worker-seconds that the stopped trials would have taken to their end, at their own pace."""
    total = 0.0
    for record in records:
        if record.status == "stopped":
            steps = trial_config(study, base, record.values).optim.steps
            total += record.worker_s / record.step * (steps - record.step)
    return total


def values_of(record: Record) -> str:
    return "  ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={json.dumps(value)}"
        for key, value in record.values.items()
    )
