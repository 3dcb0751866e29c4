"""A study in MLflow: its own run, and its trials' runs below it, each tagged when it ends. An outage is a warning."""

import json
from typing import Any

from common import retry, storage
from common.errors import NotFoundError
from training import tracking
from training.config import TrainConfig
from tuning.config import StudyConfig
from tuning.records import Record, Records


def trial_ended(study: StudyConfig, base: TrainConfig, record: Record) -> None:
    """Tag a trial's run with what became of it, and end it if its scheduler or its failures did."""
    run_id = _run_id(record)
    if run_id is None:
        return
    tags = {"study": study.name, "trial": record.name, "status": record.status, "error": record.error or ""}
    metrics = {"study/worker_s": record.worker_s, "study/seconds": record.seconds}
    if study.cost:
        metrics[f"study/{study.cost}"] = record.cost
    tracking.set_tags(base, run_id, tags)
    tracking.set_metrics(base, run_id, metrics)
    if record.status in ("stopped", "failed"):
        tracking.finish(base, run_id, {}, failed=record.status == "failed")


def study_ended(
    study: StudyConfig, base: TrainConfig, parent: str | None, records: Records, best: list[Record], is_over: bool
) -> None:
    """Tag the best trials, or those of the Pareto front, as such, and end the study's run.

    What became of a trial is told once more: the study may have been killed between the trial's record and its tags.
    """
    for record in records:
        if record.status != "running":
            trial_ended(study, base, record)
        run_id = _run_id(record)
        if run_id is not None:
            below = {} if parent is None else {"mlflow.parentRunId": parent}  # missing if MLflow was out at the start
            tracking.set_tags(base, run_id, {"best": json.dumps(record in best), **below})
    if parent is None:
        return
    tags: dict[str, Any] = {"study": study.name}
    if best:
        tags |= {"best_trial": best[0].name, "best_run": best[0].run}
    if is_over:
        tracking.finish(base, parent, tags, failed=not best)
    else:
        tracking.set_tags(base, parent, tags)


def _run_id(record: Record) -> str | None:
    url = storage.join(record.run, tracking.RECORD)
    try:
        run_id: str | None = json.loads(retry.again(lambda: storage.read(url)))["run_id"]
        return run_id  # None: MLflow was out
    except NotFoundError:
        return None  # it failed before it had one
