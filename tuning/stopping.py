"""Which trial is behind: Ray's own schedulers, asked with all reports of the study so far.

They keep what they saw in memory, and Ray does not save it (`TuneController` leaves its scheduler out of its state).
Fed anew from the records at each question they need not be saved: after a restart they answer the same.
"""

import math
from typing import Any, NamedTuple

from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler

from training.config import TrainConfig
from tuning.config import StudyConfig
from tuning.records import Record, Records

TIME = "evaluation"


class _Trial(NamedTuple):
    """What the schedulers ask of a trial."""

    trial_id: str


def is_behind(study: StudyConfig, config: TrainConfig, record: Record, records: Records | list[Record]) -> bool:
    """True if the trial should stop after its last report.

    Never after its last evaluation: nothing is saved any more, and its test metrics are still to come.

    Args:
        config: of the trial.
    """
    if study.scheduler == "none" or record.step >= config.optim.steps:
        return False
    last = math.ceil(config.optim.steps / config.eval.every)
    scheduler = _scheduler(study, last)
    trials = {r.number: _Trial(r.name) for r in records}
    for trial in trials.values():
        scheduler.on_trial_add(None, trial)
    now = record.reports[-1]
    before = [(report["time"], r.number, report) for r in records for report in r.reports if report is not now]
    before.sort(key=lambda row: (*row[:2], row[2]["step"]))
    decision = TrialScheduler.CONTINUE
    for _, number, report in [*before, (now["time"], record.number, now)]:
        result = {TIME: math.ceil(report["step"] / config.eval.every), study.metric: report[study.metric]}
        decision = scheduler.on_trial_result(None, trials[number], result)
    return bool(decision != TrialScheduler.CONTINUE)


def _scheduler(study: StudyConfig, last: int) -> Any:
    common: dict[str, Any] = {
        "time_attr": TIME,
        "metric": study.metric,
        "mode": study.mode,
        "grace_period": study.grace_reports,
    }
    if study.scheduler == "median":
        # It would pause trials while it knows few others: never. A hard stop asserts that a trial which it would have
        # stopped reports no more, as one does whose report was lost and found again (`Trials._add_missing_report`).
        return MedianStoppingRule(**common, min_time_slice=math.inf, hard_stop=False)  # type: ignore[arg-type]
    return ASHAScheduler(**common, max_t=max(last, study.grace_reports) + 1, reduction_factor=study.reduction_factor)
