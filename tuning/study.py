"""Run a study: many training runs over sampled values, compared by a validation metric.

Each trial is a run of training.train named STUDY-TRIAL in `storage`, and a child of the study's run in MLflow. The
study's folder STORAGE/NAME gets study.json: all trials and the best one. Starting the same study again goes on with
it: finished trials are kept, failed and unfinished ones go on from their checkpoints.
"""

import json
import logging
from collections.abc import Callable
from typing import Any

import ray
from ray import tune
from ray.tune.execution import class_cache
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler

from common import config as configs
from common import logs, shards, storage
from common.errors import NotFoundError, RunError, exit_with, told
from training import tracking
from training.config import TrainConfig
from training.driver import only_driver
from training.train import connect, read_result, scaling, train, with_absolute_paths
from tuning.config import STUDIES, StudyConfig
from tuning.promote import RESULT
from tuning.space import domains, plain, resolve, trial_config

log = logging.getLogger(__name__)


def run(study: StudyConfig) -> dict[str, Any]:
    """Start a study or go on with it; returns what study.json holds. Starts Ray if it is not running.

    Raises:
        ConfigError, DataError, StorageError: as one sentence, before the first trial.
        RunError: another study has this name, or all trials failed.
    """
    base = with_absolute_paths(resolve(study))
    folder = storage.join(base.run.storage, study.name)
    _, dataset_sha256 = shards.read_dataset(base.data.dataset)
    storage.check_writable(folder)
    if not ray.is_initialized():
        connect()
    with only_driver(folder):
        check_identity(study, base, folder)
        parent = tracking.find_or_create(base, folder, dataset_sha256, parent=None)
        if parent is not None:
            tracking.set_tags(base, parent, {"study": study.name})
        grid = _tuner(study, base, folder, parent).fit()
        records = [_record(study, base, trial, grid[i]) for i, trial in enumerate(_trials(grid))]
        result: dict[str, Any] = {
            "study": study.name,
            "metric": study.metric,
            "mode": study.mode,
            "dataset": base.data.dataset,
            "dataset_sha256": dataset_sha256,
            "trials": sorted(records, key=lambda t: str(t["trial"])),  # Tune's order changes when it is restored
        }
        print(table(result))
        result["best"] = best(result)
        _close_tracking(study, base, parent, result)
        if result["best"] is None:
            reasons = "; ".join(sorted({t["error"] for t in result["trials"]}))
            raise RunError(f"all {len(result['trials'])} trials of study {study.name} failed: {reasons}")
        storage.publish_bytes(json.dumps(result, indent=2).encode(), storage.join(folder, RESULT))
    return result


def check_identity(study: StudyConfig, base: TrainConfig, folder: str) -> None:
    """Refuse to go on with a study of the same name that began with other settings."""
    url = storage.join(folder, "identity.json")
    settings = study.model_dump(mode="json", exclude={"max_concurrent", "storage", "overrides", "tracking", "base"})
    mine = {**settings, "base": base.model_dump(mode="json", exclude={"run", "tracking", "workers"})}
    try:
        theirs = json.loads(storage.read(url))
    except NotFoundError:
        storage.publish_bytes(json.dumps(mine, indent=2).encode(), url)
        return
    differing = [key for key in mine if mine[key] != theirs.get(key)]
    if differing:
        raise RunError(
            f"study {folder} began with another {', '.join(differing)}: choose another name, or the old values"
        )


def best(result: dict[str, Any]) -> dict[str, Any] | None:
    """The trial with the best metric, or None if none has one."""
    scored = [t for t in result["trials"] if t["metric"] is not None and t["status"] != "failed"]
    pick = max if result["mode"] == "max" else min
    return pick(scored, key=lambda t: t["metric"]) if scored else None


def table(result: dict[str, Any]) -> str:
    """All trials, the best one first: status, metric, values; the reason of a failed one."""
    sign = -1 if result["mode"] == "max" else 1
    lines = [f"{'trial':<14}{'status':<10}{'val ' + result['metric']:>12}  values"]
    for trial in sorted(result["trials"], key=lambda t: (t["metric"] is None, sign * (t["metric"] or 0))):
        metric = "-" if trial["metric"] is None else f"{trial['metric']:.4g}"
        values = "  ".join(
            f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={json.dumps(value)}"
            for key, value in trial["values"].items()
        )
        lines.append(
            f"{trial['trial']:<14}{trial['status']:<10}{metric:>12}  {values}  {trial['error'] or ''}".rstrip()
        )
    return "\n".join(lines)


def _tuner(study: StudyConfig, base: TrainConfig, folder: str, parent: str | None) -> tune.Tuner:
    def trial(values: dict[str, Any]) -> None:
        # The trial's id and not the time: a trial that starts again finds its run's checkpoints.
        name = run_name(study, tune.get_context().get_trial_id())
        sampled = {key: plain(value) for key, value in values.items()}
        config = configs.apply(trial_config(study, base, sampled), {"run.name": name})
        train(config, callbacks=[TuneReportCallback()], parent=parent)

    # Tune would copy the driver's AWS keys into each trial's runtime environment, which the dashboard shows.
    class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    # It only waits. A share of a CPU would keep the trial's own workers from fitting, and Tune refuses to reserve
    # nothing at all: so one byte of memory.
    trainable: Callable[..., Any] = tune.with_resources(trial, {"cpu": 0, "memory": 1})
    if tune.Tuner.can_restore(folder):
        log.info("going on with study %s", folder)
        return tune.Tuner.restore(folder, trainable, resume_unfinished=True, resume_errored=True)
    at_once = study.max_concurrent or _room(base)
    return tune.Tuner(
        trainable,
        param_space=domains(study),
        tune_config=tune.TuneConfig(
            metric=study.metric,
            mode=study.mode,
            search_alg=_searcher(study, at_once),
            scheduler=_scheduler(study, base),
            num_samples=study.trials,
            # Tune ignores this, with a warning, for a searcher that has a limit of its own.
            max_concurrent_trials=at_once if study.searcher == "optuna" else None,
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(name=study.name, storage_path=base.run.storage, verbose=1),
    )


def run_name(study: StudyConfig, trial: str) -> str:
    return f"{study.name}-{trial}"


def _searcher(study: StudyConfig, at_once: int) -> Any:
    if study.searcher == "optuna":
        from ray.tune.search.optuna import OptunaSearch

        return OptunaSearch(seed=study.seed)
    from ray.tune.search.basic_variant import BasicVariantGenerator

    return BasicVariantGenerator(max_concurrent=at_once, random_state=study.seed)


def _scheduler(study: StudyConfig, base: TrainConfig) -> Any:
    if study.scheduler == "none":
        return None
    reports = -(-base.optim.steps // base.eval.every)
    return ASHAScheduler(
        time_attr="training_iteration",
        max_t=max(reports, study.grace_reports) + 1,  # a trial that reaches max_t is stopped before its test metrics
        grace_period=study.grace_reports,
        reduction_factor=study.reduction_factor,
    )


def _room(base: TrainConfig) -> int:
    """How many trials the cluster holds now. Raises ConfigError if not even one."""
    needed, there = scaling(base).total_resources, ray.cluster_resources()
    return max(1, int(min(there.get(name, 0) // amount for name, amount in needed.items() if amount)))


def _trials(grid: tune.ResultGrid) -> list[Any]:
    return list(grid._experiment_analysis.trials)  # no public way to the values of a trial that never reported


def _record(study: StudyConfig, base: TrainConfig, trial: Any, outcome: Any) -> dict[str, Any]:
    url = storage.join(base.run.storage, run_name(study, trial.trial_id))
    reports = outcome.metrics_dataframe
    metric = None
    if reports is not None and study.metric in reports and reports[study.metric].notna().any():
        # Over all reports and not the last: best/ holds the weights of the best one.
        metric = float(getattr(reports[study.metric], study.mode)())
    error = outcome.error and str(told(outcome.error) or str(outcome.error).strip().splitlines()[-1])
    status = "failed" if error else "finished" if read_result(url) is not None else "stopped"
    return {
        "trial": trial.trial_id,
        "status": status,
        "metric": metric,
        "values": {key: plain(value) for key, value in trial.config.items()},
        "run": url,
        "error": error or None,
    }


def _close_tracking(study: StudyConfig, base: TrainConfig, parent: str | None, result: dict[str, Any]) -> None:
    """Tag every trial's MLflow run, the best one as such; end the runs that the scheduler stopped, and the study's."""
    top = result["best"]
    for trial in result["trials"]:
        try:
            run_id = json.loads(storage.read(storage.join(trial["run"], tracking.RECORD)))["run_id"]
        except NotFoundError:
            continue
        tags = {"study": study.name, "trial": trial["status"], "best": json.dumps(trial is top)}
        tracking.set_tags(base, run_id, tags)
        if trial["status"] == "stopped":
            tracking.finish(base, run_id, {})
    if parent is not None:
        tags = {} if top is None else {"best_trial": top["trial"], "best_run": top["run"]}
        tracking.finish(base, parent, tags, failed=top is None)


def main() -> int:
    study = configs.from_command_line(StudyConfig, STUDIES, "tuning.study")
    logs.setup()
    result = run(study)
    print(f"best: trial {result['best']['trial']}, run {result['best']['run']}")
    return 0


if __name__ == "__main__":
    exit_with(main)
