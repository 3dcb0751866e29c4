"""The study's trials as Ray Tune meets them: asked for one more start of a trial, told what became of it.

A trial of Tune's is one start of a trial of ours. So a trial that failed, or whose study was killed, is simply started
again, and goes on from its run's checkpoints.
"""

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray import cloudpickle
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher

from common import config as configs
from common import storage
from common.errors import ConfigError, DataError, RunError, TryAgainError, told
from training.config import TrainConfig
from training.train import read_result, scaling, with_absolute_paths
from training.weights import best_scores
from tuning import tracking
from tuning.config import METRICS, StudyConfig
from tuning.cost import inference_cost
from tuning.records import Record, Records
from tuning.search import propose
from tuning.space import trial_config
from tuning.stopping import is_behind

log = logging.getLogger(__name__)


@dataclass
class Start:
    """One start of a trial that is under way."""

    record: Record
    seconds_before: float
    began: float = field(default_factory=time.monotonic)
    loop_began: float = 0.0  # of its last report
    loop_s: float = 0.0

    def count(self, result: dict[str, Any]) -> None:
        """Add what was spent since the last report."""
        self.record.seconds = self.seconds_before + time.monotonic() - self.began
        if "loop_s" not in result:
            return
        # It begins at zero again when Ray Train starts the workers again.
        before = self.loop_s if result["loop_began"] == self.loop_began else 0.0
        self.record.worker_s += (result["loop_s"] - before) * result["ranks"]
        self.loop_began, self.loop_s = result["loop_began"], result["loop_s"]


class Trials(FIFOScheduler):
    """Tune's scheduler, and through `Source` its searcher."""

    def __init__(self, study: StudyConfig, base: TrainConfig, records: Records) -> None:
        super().__init__()
        self.study, self.base, self.records = study, base, records
        self.starts: dict[str, Start] = {}  # by Tune's id
        self.is_over = False

    def next(self, tune_id: str) -> dict[str, Any] | str | None:
        """The next start, None if there is no room for one, or Searcher.FINISHED."""
        live = {start.record.number for start in self.starts.values()}
        if live and len(live) >= (self.study.max_concurrent or room(self.base)):
            return None
        waiting = (r for r in self.records if r.status == "running" and r.number not in live)
        record = next(waiting, None) or self._new()
        if record is None:
            self.is_over = not live
            return Searcher.FINISHED if self.is_over else None
        self.starts[tune_id] = Start(record, record.seconds)
        return {"config": self._config(record).model_dump_json()}

    def _config(self, record: Record) -> TrainConfig:
        """Of a trial, for whatever folder it runs in. Raises ConfigError."""
        config = configs.apply(trial_config(self.study, self.base, record.values), {"workers.autoscale": True})
        return with_absolute_paths(configs.apply(config, {"run.name": run_name(self.study, record.number)}))

    def _new(self) -> Record | None:
        while self.study.trials is None or len(self.records) < self.study.trials:
            values = propose(self.study, self.base, self.records)
            if values is None:
                return None
            number = max((record.number for record in self.records), default=-1) + 1
            record = Record(number, values, storage.join(self.base.run.storage, run_name(self.study, number)))
            try:
                config = self._config(record)
                record.cost = inference_cost(self.study.cost, config) if self.study.cost else 0.0
            except ConfigError as error:  # a model that can't be built: it would be drawn again at each start
                log.warning("trial %s is given up: %s", record.name, error)
                record.status, record.error, record.failures = "failed", str(error), self.study.max_failures + 1
            self.records.save(record)
            if record.status == "running":
                return record
        return None

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        start = self.starts[trial.trial_id]
        record = start.record
        start.count(result)
        if self.study.metric not in result or result["step"] <= record.step:  # no evaluation, or one that is repeated
            return self.CONTINUE
        metrics = {name: float(result[name]) for name in METRICS if name in result}
        record.reports.append({"step": result["step"], **metrics, "time": time.time(), "worker_s": record.worker_s})
        config = trial_config(self.study, self.base, record.values)
        if is_behind(self.study, config, record, self.records):
            record.status = "stopped"
        self.records.save(record)
        return self.STOP if record.status == "stopped" else self.CONTINUE

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        start = self.starts[trial.trial_id]
        record = start.record
        start.count(result)
        if record.status != "stopped" and read_result(record.run) is not None:
            record.status, record.error = "finished", None
            self._add_missing_report(record)
        self._ended(trial.trial_id)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        start = self.starts[trial.trial_id]
        record = start.record
        start.count({})
        if record.status != "running":  # Tune takes an error in what is told below for one of the trial
            self._ended(trial.trial_id)
            return
        error = _error_of(trial)
        known = told(error)
        record.error = str(known or str(error).strip().splitlines()[-1])
        record.failures += 1
        if isinstance(known, ConfigError | DataError | RunError) and not isinstance(known, TryAgainError):
            record.failures = self.study.max_failures + 1  # it would fail alike
        if record.failures > self.study.max_failures:
            record.status = "failed"
        then = "it is given up" if record.status == "failed" else "it is started again"
        log.warning("a start of trial %s failed, %s: %s", record.name, then, record.error)
        self._ended(trial.trial_id)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self.starts.pop(trial.trial_id)

    def _add_missing_report(self, record: Record) -> None:
        """A report is lost if the study is killed before it is recorded: what best/ holds is known all the same."""
        found = best_scores(record.run)
        if found is not None and found[0] not in {r["step"] for r in record.reports} and self.study.metric in found[1]:
            step, scores = found
            metrics = {name: scores[name] for name in METRICS if name in scores}
            later = [report for report in record.reports if report["step"] > step]
            known = later[0] if later else {"time": time.time(), "worker_s": record.worker_s}
            record.reports.append({"step": step, **metrics, "time": known["time"], "worker_s": known["worker_s"]})
            record.reports.sort(key=lambda report: report["step"])

    def _ended(self, tune_id: str) -> None:
        record = self.starts[tune_id].record
        self.records.save(record)
        tracking.trial_ended(self.study, self.base, record)
        del self.starts[tune_id]


class Source(Searcher):
    """Tune's searcher: passes questions on."""

    def __init__(self, trials: Trials) -> None:
        super().__init__()
        self.trials = trials

    def suggest(self, trial_id: str) -> Any:
        return self.trials.next(trial_id)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass  # the scheduler is told with more

    def save(self, checkpoint_path: str) -> None:
        pass  # the records are all there is


def run_name(study: StudyConfig, number: int) -> str:
    return f"{study.name}-{number:04d}"


def _error_of(trial: Any) -> Exception:
    """What a start of a trial died of, as Tune has written it down."""
    if trial.pickled_error_file is None:
        return RuntimeError(Path(trial.error_file).read_text())
    error: Exception = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    return error


def room(base: TrainConfig) -> int:
    """How many trials the cluster holds now, at least one: a node that was lost may come back."""
    patient = configs.apply(base, {"workers.autoscale": True})
    needed, there = scaling(patient).total_resources, ray.cluster_resources()
    # 1 // 0.2 is 4.
    return max(1, int(min(there.get(name, 0) / amount for name, amount in needed.items() if amount) + 1e-6))
