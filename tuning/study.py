"""Run a study: many training runs over sampled values, compared by a validation metric.

Each trial is a run of training.train named STUDY-NUMBER, and a child of the study's run in MLflow. The study's folder
STORAGE/NAME gets their runs, what is known of each (trials/), study.json and the report study.html. Starting the same
study again goes on with it, whatever was killed: what has ended stays as it is, what was under way goes on from its
checkpoints. With more `trials` it grows, with a larger `max_failures` failed trials are started once more.
"""

import dataclasses
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray.tune.analysis import experiment_analysis
from ray.tune.execution import class_cache

from common import config as configs
from common import logs, shards, storage
from common.errors import NotFoundError, RunError, exit_with
from common.shards import DatasetIndex
from training.config import TrainConfig
from training.driver import only_driver
from training.tracking import find_or_create, log_artifact
from training.train import check, connect, differences, scaling, train, with_absolute_paths, with_loaders
from tuning import report, tracking
from tuning.config import STUDIES, StudyConfig
from tuning.records import Records, front, ranked
from tuning.reports import Reports
from tuning.space import configurations, resolve
from tuning.table import LiveTable, table
from tuning.trials import Source, Trials

log = logging.getLogger(__name__)
RESULT, REPORT, PRESET = "study.json", "study.html", "study.yaml"
MAX_MODELS = 50  # that are tried before the first trial
PLACES = ("dataset", "cache")
MAY_CHANGE = {"trials", "max_concurrent", "max_failures", "time_budget_s", "storage", "tracking", "overrides", "base"}


def run(study: StudyConfig) -> dict[str, Any]:
    """Start a study or go on with it; returns what study.json holds. Starts Ray if it is not running.

    Raises:
        ConfigError, DataError, StorageError: as one sentence, before the first trial.
        RunError: another study has this name, or all trials failed.
    """
    base = with_absolute_paths(resolve(study))
    folder = storage.join(base.run.storage, study.name)
    base = configs.apply(base, {"run.storage": folder})
    dataset, dataset_sha256 = shards.read_dataset(base.data.dataset)
    check_trials(study, base, dataset)
    storage.check_writable(folder)
    os.environ |= {  # the study would wait for minutes while MLflow is out
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    }
    if not ray.is_initialized():
        connect()
    scaling(base)  # a trial that can never fit is refused here; later the cluster may be short of a node for a while
    with only_driver(folder):
        check_identity(study, base, folder, dataset_sha256)
        storage.publish_bytes(configs.dump(study).encode(), storage.join(folder, PRESET))
        parent = find_or_create(base, folder, dataset_sha256, parent=None)
        records = Records(folder)
        for record in records:
            if record.status == "failed" and record.failures <= study.max_failures:
                record.status = "running"
        trials = Trials(study, base, records)
        _tuner(trials, folder, parent).fit()
        result = _result(trials, dataset_sha256)
        _publish(trials, result, folder, parent)
    if result["is_over"] and not result["best"]:
        reasons = "; ".join(sorted({str(record.error) for record in records}))
        raise RunError(f"all {len(records)} trials of study {study.name} failed: {reasons}")
    return result


def _result(trials: Trials, dataset_sha256: str) -> dict[str, Any]:
    """What study.json holds."""
    study, records = trials.study, trials.records
    best = front(study, records) if study.cost else ranked(study, records)[:1]
    return {
        "study": study.name,
        "metric": study.metric,
        "mode": study.mode,
        "cost": study.cost,
        "dataset": trials.base.data.dataset,
        "dataset_sha256": dataset_sha256,
        "workers": trials.base.workers.model_dump(mode="json"),
        "is_over": trials.is_over,
        "best": [record.number for record in best],
        "trials": [{**dataclasses.asdict(record), "metric": record.metric(study)} for record in records],
    }


def _publish(trials: Trials, result: dict[str, Any], folder: str, parent: str | None) -> None:
    """study.json and study.html, the table on the terminal, and the tags in MLflow."""
    study, base, records = trials.study, trials.base, trials.records
    storage.publish_bytes(json.dumps(result, indent=2).encode(), storage.join(folder, RESULT))
    page = report.render(study, base, records).encode()
    storage.publish_bytes(page, storage.join(folder, REPORT))
    print(table(study, base, records), flush=True)
    by_number = {record.number: record for record in records}
    best = [by_number[number] for number in result["best"]]
    tracking.study_ended(study, base, parent, records, best, trials.is_over)
    if parent is not None:
        with tempfile.TemporaryDirectory() as local:
            (Path(local) / REPORT).write_bytes(page)
            log_artifact(folder, Path(local) / REPORT)


def check_trials(study: StudyConfig, base: TrainConfig, dataset: DatasetIndex) -> None:
    """Refuse what a trial would be refused for: splits, frames or a batch that the dataset lacks, an impossible model.

    Raises:
        ConfigError, DataError, RunError: as one sentence.
    """
    seen: set[str] = set()
    for config in configurations(study, base):
        if len(seen) == MAX_MODELS:
            break
        parts = config.model_dump_json(
            include={"data": True, "model": True, "optim": {"batch_size"}, "eval": {"views"}}
        )
        if parts not in seen:
            seen.add(parts)
            check(with_absolute_paths(config), dataset)


def check_identity(study: StudyConfig, base: TrainConfig, folder: str, dataset_sha256: str) -> None:
    """Refuse to go on with a study of the same name that began with other settings, or another dataset."""
    url = storage.join(folder, "identity.json")
    settings = study.model_dump(mode="json", exclude=MAY_CHANGE)
    values = base.model_dump(mode="json", exclude={"run", "tracking", "workers"})
    values["data"] = {"sha256": dataset_sha256, **{k: v for k, v in values["data"].items() if k not in PLACES}}
    mine = {**settings, "base": values}
    try:
        theirs = json.loads(storage.read(url))
    except NotFoundError:
        storage.publish_bytes(json.dumps(mine, indent=2).encode(), url)
        return
    differing = "; ".join(differences(mine, theirs, ""))
    if differing:
        raise RunError(f"study {folder} began otherwise ({differing}): choose another name, or the old values")


def _tuner(trials: Trials, folder: str, parent: str | None) -> tune.Tuner:
    study, base = trials.study, trials.base
    loaders = {"workers.loader_workers": with_loaders(base).workers.loader_workers}

    def trial(start: dict[str, Any]) -> None:
        config = configs.apply(TrainConfig.model_validate_json(start["config"]), loaders)
        train(config, callbacks=[Reports()], parent=parent)

    # Tune would copy the driver's AWS keys into each trial's runtime environment, which the dashboard shows.
    class_cache.ENV_VARS_TO_PROPAGATE -= {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    # It misses the files of the loggers that are disabled here.
    logging.getLogger(experiment_analysis.__name__).setLevel(logging.ERROR)
    os.environ |= {
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the study at once; it goes on like any killed one
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the records and MLflow have it all
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # tracebacks; Trials tells the reason
        "RAY_AIR_NEW_OUTPUT": "0",  # prints a table of its own, even if asked not to
    }
    # A trial's driver only waits: a share of a CPU would keep its own workers from fitting. It lives on the head, so
    # the loss of another node costs no more than workers, which Ray Train starts again.
    place = tune.PlacementGroupFactory([{"CPU": 0, "node:__internal_head__": 0.001}])
    return tune.Tuner(
        tune.with_resources(trial, place),
        tune_config=tune.TuneConfig(
            search_alg=Source(trials),
            scheduler=trials,
            num_samples=-1,
            time_budget_s=study.time_budget_s,
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name="tune", storage_path=folder, verbose=0, callbacks=[LiveTable(study, base, trials.records)]
        ),
    )


def main() -> int:
    study = configs.from_command_line(StudyConfig, STUDIES, "tuning.study")
    logs.setup()
    result = run(study)
    folder = storage.join(storage.absolute(study.storage), study.name)
    print(f"report: {storage.join(folder, REPORT)}")
    if not result["is_over"]:
        print("not over: the same command goes on with what is unfinished")
    for number in result["best"]:
        print(f"best: trial {number}; as a preset: python -m tuning.promote {folder} trial={number} preset=NAME")
    return 0


if __name__ == "__main__":
    exit_with(main)
