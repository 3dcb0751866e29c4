"""Metrics, with intervals, of finished runs' best weights, by all workers of a Ray cluster; a report as JSON and HTML.

    python -m training.evaluate RUN [RUN ...] [data.test=SPLIT] [eval.views=1] [report=FOLDER] ...

RUN is a run's folder (STORAGE/NAME); its config.yaml is the preset, and data.test names the split to evaluate. Of runs
that differ in their seed alone the mean is told too. docs/evaluation.md says what each number means.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ray
from ray.train import RunConfig
from ray.train.torch import TorchTrainer, get_device

from common import config as configs
from common import logs, retry, shards, storage
from common.config import refuse_relative_in_job
from common.errors import ConfigError, RunError, exit_with, told
from common.shards import SplitIndex
from training import models, report, report_page
from training.choices import Choices, read_labels, read_questions
from training.config import PRESETS, EvaluateConfig, TrainConfig, run_lines
from training.data import pictures
from training.data.loader import EvalBatch, check_frames, eval_loader, open_cache
from training.encode import encode_split, evaluation
from training.failures import TellFailures, without_traceback
from training.metrics import Evaluation
from training.report import Report, RunReport
from training.train import connect, scaling, with_absolute_paths, with_loaders
from training.weights import load_best, load_config, load_run, run_url

log = logging.getLogger(__name__)
FRAMES = 4  # of an example's video
Worker = Callable[[dict[str, Any]], Any]


def evaluate_runs(given: Sequence[EvaluateConfig]) -> tuple[Report, str]:
    """Evaluate runs, one after the other, and publish the report; returns it and the URL of its folder.

    Raises:
        ConfigError, DataError, RunError, StorageError: as one sentence.
    """
    first = given[0]
    for config in given:
        refuse_relative_in_job(config, "report", "questions", "labels", "recall")
        if config.data.test is None:
            raise ConfigError("data.test is null: give data.test=SPLIT")
    if len({(storage.absolute(config.data.dataset), config.data.test) for config in given}) > 1:
        raise ConfigError("the runs name different test sets: give data.dataset and data.test for all of them")
    if len({run_url(config) for config in given}) < len(given):
        raise ConfigError("a run is given twice: name each once")
    name = f"{first.data.test}-{time.strftime('%Y%m%d-%H%M%S')}"
    folder = storage.absolute(first.report or storage.join(run_url(first), "evaluations", name))
    storage.check_writable(folder)
    runs = [evaluate_run(config, name) for config in given]
    return publish(given, runs, folder), folder


def publish(given: Sequence[EvaluateConfig], runs: Sequence[RunReport], folder: str) -> Report:
    """Write report.json and report.html of what was measured, with frames of the examples."""
    config, url = given[0], storage.absolute(given[0].data.dataset)
    dataset, sha256 = shards.read_dataset(url)
    differ_in_seed = _differ_in_seed_alone(given)
    if len(given) > 1 and not differ_in_seed:
        log.warning("the runs differ in more than their seed: there is no mean over them")
    found = Report(
        dataset=url,
        dataset_sha256=sha256,
        split=str(config.data.test),
        confidence=config.confidence,
        resamples=config.resamples,
        runs=list(runs),
        over_runs=report.mean_over_runs(runs, config.confidence) if differ_in_seed else None,
        notes=report.notes(runs, config.confidence, config.resamples),
    )
    videos = {video for run in runs for e in (*run.hardest, *run.easiest) for video in (e.video, e.rival)}
    images = pictures.frames_of(url, dataset.split(found.split), videos, FRAMES)
    storage.publish_bytes(found.model_dump_json(indent=2).encode(), storage.join(folder, "report.json"))
    storage.publish_bytes(report_page.render(found, images).encode(), storage.join(folder, "report.html"))
    return found


def evaluate_run(config: EvaluateConfig, name: str) -> RunReport:
    """What is measured of one run; Ray's own files go to `name` in the run's evaluations."""
    if config.recall is not None:
        config = configs.apply(config, {"recall": storage.absolute(config.recall)})
    dataset, _ = shards.read_dataset(storage.absolute(config.data.dataset))
    if config.recall is not None:
        first = _first_stage(config)
        check_frames(first, config.data.dataset, dataset, str(config.data.test), first.eval.views)
    asked = _asked(config, dataset.split(str(config.data.test)))
    found, step = on_workers(config, _worker, name, asked=asked)
    return report.of_run(config, run_url(config), step, found)


def on_workers(config: TrainConfig, worker: Worker, name: str, **settings: Any) -> Any:
    """What `worker` gives on rank 0 of all workers for the split data.test.

    Args:
        worker: called with {"config": `config` as plain data, **settings}.
        name: of the folder for Ray's own files in the run's evaluations.

    Raises:
        ConfigError, DataError, RunError: as one sentence.
    """
    sized = with_loaders(with_absolute_paths(config))
    dataset, _ = shards.read_dataset(sized.data.dataset)
    check_frames(sized, sized.data.dataset, dataset, str(sized.data.test), sized.eval.views)
    trainer = TorchTrainer(
        worker,
        train_loop_config={"config": sized.model_dump(mode="json"), **settings},
        scaling_config=scaling(sized),
        run_config=RunConfig(
            name=name,
            storage_path=storage.join(run_url(sized), "evaluations"),
            callbacks=[TellFailures()],  # type: ignore[list-item]
        ),
    )
    try:
        return trainer.fit().return_value  # type: ignore[attr-defined]
    except Exception as error:
        raise (told(error) or error) from None


def _first_stage(config: EvaluateConfig) -> TrainConfig:
    """The run `recall` as it reads this run's split. Raises RunError if it has a scorer, as what would find then."""
    assert config.recall is not None
    other = load_config(config.recall)
    if other.model.scorer is not None:
        raise RunError(f"recall={config.recall} has model.scorer={other.model.scorer.name}: give a run without one")
    same = {"data.dataset": config.data.dataset, "data.test": config.data.test, "data.cache": config.data.cache}
    return configs.apply(other, {**same, "eval.batch_size": config.eval.batch_size})


def _asked(config: EvaluateConfig, split: SplitIndex) -> Choices | None:
    """The questions and classes, read here: a wrong file is told before a worker starts."""
    if config.questions is None and config.labels is None:
        return None
    markers = (shards.read_marker(config.data.dataset, entry.name) for entry in split.shards)
    videos = {sample.video_id for marker in markers for sample in marker.samples}
    questions = read_questions(config.questions, videos) if config.questions else []
    labels, classes = read_labels(config.labels, videos) if config.labels else ({}, [])
    return Choices(questions, labels, classes, config.templates)


def _worker(values: dict[str, Any]) -> tuple[Evaluation, int]:
    config = EvaluateConfig.model_validate(values["config"])
    logs.setup(ray.train.get_context().get_world_rank())
    device = get_device()
    with without_traceback():
        first = None
        if config.recall is not None:
            finder, model = _first_stage(config), load_run(config.recall)[1].to(device)
            first = encode_split(model, split_batches(finder), models.tokenize(finder.model), finder.eval.views, device)
        model = models.build(config.model, load=False).to(device)
        step = load_best(run_url(config), model)["step"]
        tokenize = models.tokenize(config.model)
        return evaluation(model, split_batches(config), tokenize, config.eval, device, values["asked"], first), step


def split_batches(config: TrainConfig) -> Iterable[EvalBatch]:
    """This rank's videos of the split."""
    context = ray.train.get_context()
    dataset, sha256 = retry.again(lambda: shards.read_dataset(config.data.dataset))
    cache, split = open_cache(config, sha256), str(config.data.test)
    return eval_loader(config, dataset, cache, split, context.get_world_rank(), context.get_world_size())


def _differ_in_seed_alone(given: Sequence[EvaluateConfig]) -> bool:
    """True of several runs of one procedure: where they lie and how they were computed does not matter."""
    aside = {"run", "seed", "checkpoint", "workers", "tracking"}
    same = {json.dumps(config.model_dump(mode="json", exclude=aside), sort_keys=True) for config in given}
    return len(given) > 1 and len(same) == 1 and len({config.seed for config in given}) == len(given)


def main() -> int:
    lines = run_lines(sys.argv[1:])
    given = [configs.from_command_line(EvaluateConfig, PRESETS, "training.evaluate", line) for line in lines]
    logs.setup()
    connect()
    found, folder = evaluate_runs(given)
    print(json.dumps({**report.shown(found), "report": folder}, indent=2))
    return 0


if __name__ == "__main__":
    exit_with(main)
