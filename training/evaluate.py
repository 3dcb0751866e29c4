"""Metrics, with intervals, of finished runs' best weights, by all workers of a Ray cluster; a report as JSON and HTML.

    python -m training.evaluate RUN [RUN ...] [data.test=SPLIT] [eval.views=1] [report=FOLDER] ...

RUN is a run's folder (STORAGE/NAME); its config.yaml is the preset, and data.test names the split to evaluate. Of runs
that differ in their seed alone the mean is told too. docs/evaluation.md says what each number means.
"""

import itertools
import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.train import RunConfig
from ray.train.torch import TorchTrainer, get_device

from common import config as configs
from common import logs, shards, storage
from common.config import refuse_relative_in_job
from common.errors import ConfigError, exit_with, told
from common.shards import SplitIndex
from training import models, report, report_page
from training.choices import Choices, read_labels, read_questions
from training.config import PRESETS, EvaluateConfig
from training.data import pictures
from training.data.loader import check_frames
from training.failures import TellFailures, without_traceback
from training.loop import test_evaluation
from training.metrics import Evaluation
from training.report import Report, RunReport
from training.train import connect, scaling, with_absolute_paths, with_loaders
from training.weights import run_url

log = logging.getLogger(__name__)
FRAMES = 4  # of an example's video


def evaluate_runs(given: Sequence[EvaluateConfig]) -> tuple[Report, str]:
    """Evaluate runs, one after the other, and publish the report; returns it and the URL of its folder.

    Raises:
        ConfigError, DataError, RunError, StorageError: as one sentence.
    """
    first = given[0]
    for config in given:
        refuse_relative_in_job(config, "report", "questions", "labels")
        if config.data.test is None:
            raise ConfigError("data.test is null: give data.test=SPLIT")
    if len({(storage.absolute(config.data.dataset), config.data.test) for config in given}) > 1:
        raise ConfigError("the runs name different test sets: give data.dataset and data.test for all of them")
    name = f"{first.data.test}-{time.strftime('%Y%m%d-%H%M%S')}"
    runs = [evaluate_run(config, name) for config in given]
    folder = storage.absolute(first.report or storage.join(run_url(first), "evaluations", name))
    return publish(given, runs, folder), folder


def publish(given: Sequence[EvaluateConfig], runs: Sequence[RunReport], folder: str) -> Report:
    """Write report.json and report.html of what was measured, with frames of the examples."""
    config, url = given[0], storage.absolute(given[0].data.dataset)
    dataset, sha256 = shards.read_dataset(url)
    is_one_model = _differ_in_seed_alone(given)
    if len(given) > 1 and not is_one_model:
        log.warning("the runs differ in more than their seed: there is no mean over them")
    found = Report(
        dataset=url,
        dataset_sha256=sha256,
        split=str(config.data.test),
        confidence=config.confidence,
        resamples=config.resamples,
        runs=list(runs),
        over_runs=report.mean_over_runs(runs, config.confidence) if is_one_model else None,
        notes=report.notes(runs, config.confidence, config.resamples),
    )
    videos = {video for run in runs for e in (*run.hardest, *run.easiest) for video in (e.video, e.rival)}
    images = pictures.frames_of(url, dataset.split(found.split), videos, FRAMES)
    storage.publish_bytes(found.model_dump_json(indent=2).encode(), storage.join(folder, "report.json"))
    storage.publish_bytes(report_page.render(found, images).encode(), storage.join(folder, "report.html"))
    return found


def evaluate_run(config: EvaluateConfig, name: str) -> RunReport:
    """What is measured of one run; Ray's own files go to `name` in the run's evaluations."""
    sized = with_loaders(with_absolute_paths(config))
    dataset, _ = shards.read_dataset(sized.data.dataset)
    split = dataset.split(str(sized.data.test))
    check_frames(sized, sized.data.dataset, dataset, str(sized.data.test), sized.eval.views)
    trainer = TorchTrainer(
        _worker,  # type: ignore[arg-type]
        train_loop_config={"config": sized.model_dump(mode="json"), "asked": _asked(config, split)},
        scaling_config=scaling(sized),
        run_config=RunConfig(
            name=name,
            storage_path=storage.join(run_url(sized), "evaluations"),
            callbacks=[TellFailures()],  # type: ignore[list-item]
        ),
    )
    try:
        evaluation, step = trainer.fit().return_value  # type: ignore[attr-defined]
    except Exception as error:
        raise (told(error) or error) from None
    return report.of_run(config, run_url(sized), step, evaluation)


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
    model = models.build(config.model, load=False).to(device)
    with without_traceback():
        return test_evaluation(config, model, run_url(config), device, values["asked"])


def _differ_in_seed_alone(given: Sequence[EvaluateConfig]) -> bool:
    """True of several runs of one procedure: where they lie and how they were computed does not matter."""
    aside = {"run", "seed", "checkpoint", "workers", "tracking"}
    same = {json.dumps(config.model_dump(mode="json", exclude=aside), sort_keys=True) for config in given}
    return len(given) > 1 and len(same) == 1 and len({config.seed for config in given}) == len(given)


def arguments(argv: Sequence[str]) -> list[list[str]]:
    """A command line per run, with RUN as preset, and as the place of the weights wherever it lay when trained."""
    if not argv or argv[0].startswith("-"):
        return [list(argv)]
    runs = [argv[0], *itertools.takewhile(lambda a: "=" not in a and not a.startswith("-"), argv[1:])]
    lines = []
    for given in runs:
        run = storage.absolute(given.removesuffix("/config.yaml").rstrip("/"))
        folder, _, name = run.rpartition("/")
        keys = argv[len(runs) :]
        lines.append([storage.join(run, "config.yaml"), f"run.storage={folder}", f"run.name={name}", *keys])
    return lines


def main() -> int:
    lines = arguments(sys.argv[1:])
    given = [configs.from_command_line(EvaluateConfig, PRESETS, "training.evaluate", line) for line in lines]
    logs.setup()
    connect()
    found, folder = evaluate_runs(given)
    print(json.dumps({**report.shown(found), "report": folder}, indent=2))
    return 0


if __name__ == "__main__":
    exit_with(main)
