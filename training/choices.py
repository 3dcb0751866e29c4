"""A video chooses among sentences: multiple-choice questions, and the names of action classes (zero-shot).

Shapes: Q queries (a video with its question, a video with its class), N sentences.
"""

import csv
import io
import json
import logging
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from common import storage
from common.errors import DataError
from common.shards import VIDEO_SUFFIXES, SampleInfo
from training.metrics import Counts, Measured, Ranks, summary
from training.ranking import Rows, Score, rank

log = logging.getLogger(__name__)
FORMS = "a .csv file with a header, a JSON list of objects, or one JSON object a line"


class Question(NamedTuple):
    """Sentences of which one, `options[answer]`, is about the video."""

    video: str
    options: list[str]
    answer: int


class Choices(NamedTuple):
    """All that the videos of a split are asked; either part may be empty.

    `labels`: places in `classes` by video id; a class is asked for as each of `templates`, its name in place of {}.
    """

    questions: list[Question]
    labels: dict[str, int]
    classes: list[str]
    templates: list[str]

    @property
    def sentences(self) -> list[str]:
        """What is to be encoded: every question's options, then every class in every template."""
        options = [option for question in self.questions for option in question.options]
        return options + [template.replace("{}", name) for name in self.classes for template in self.templates]


def read_questions(url: str, videos: Collection[str]) -> list[Question]:
    """Multiple-choice questions, MSR-VTT's 2,990 x 5 for one, about `videos`.

    JSON objects have "video" (or "video_id"), "options" (or "captions", "caption"), a list, and "answer", the place of
    the right one counted from 0. In CSV every column beside `video` and `answer` holds an option.

    Raises:
        DataError, StorageError: as one sentence.
    """
    questions = []
    for number, record in _records(url):
        video = record.get("video", record.get("video_id"))
        options = next((record[key] for key in ("options", "captions", "caption") if key in record), None)
        if options is None:
            options = [v for k, v in record.items() if k not in ("video", "video_id", "answer") and v]
        try:
            answer = int(record.get("answer", ""))
        except (TypeError, ValueError):
            answer = -1
        if not isinstance(options, list) or len(options) < 2 or not 0 <= answer < len(options):
            raise DataError(
                f"{url}, entry {number} is no question: expected a video, two options or more, and an answer that is "
                "the place of the right one, counted from 0"
            )
        questions.append(Question(str(video), [str(option) for option in options], answer))
    names = _known([question.video for question in questions], videos, url)
    return [q._replace(video=names[q.video]) for q in questions if q.video in names]


def read_labels(url: str, videos: Collection[str]) -> tuple[dict[str, int], list[str]]:
    """Class numbers by video id, and the names of the classes: all that the entries' "video" and "label" name.

    Raises:
        DataError, StorageError: as one sentence.
    """
    labels = {}
    for number, record in _records(url):
        video, label = (str(record.get(key) or "").strip() for key in ("video", "label"))
        if not video or not label:
            raise DataError(f"{url}, entry {number} has no video and label: each entry needs both")
        labels[video] = label
    classes = sorted(set(labels.values()))
    if len(classes) < 2:
        raise DataError(f"{url} names one class only: there is nothing to choose")
    return {video: classes.index(labels[name]) for name, video in _known(labels, videos, url).items()}, classes


def measure(
    choices: Choices, features: Tensor, videos: Tensor, infos: Sequence[SampleInfo], score: Score
) -> list[Measured]:
    """Ranks of the right sentence among those that its video chooses from. A collective.

    Args:
        features: what a score reads of `choices.sentences`.
        videos: what it reads of all videos, in the order of `infos`.
    """
    row = {info.video_id: number for number, info in enumerate(infos)}
    measured = []
    if choices.questions:
        about = np.array([row[question.video] for question in choices.questions])
        rows, right, most = _questions(choices.questions, features, videos[about], score)
        measured.append(Measured("", qa_table, rank(rows, right, most).ranks_Q, about))
    if choices.labels:
        about = np.array([row[video] for video in choices.labels])
        prompts = len(choices.classes) * len(choices.templates)
        rows = _classes(len(choices.classes), features[-prompts:], videos[about], score)
        ranks = rank(rows, [[label] for label in choices.labels.values()], prompts)
        measured.append(Measured("", action_table, ranks.ranks_Q, about))
    return measured


def qa_table(ranks_Q: Ranks, counts_Q: Counts) -> dict[str, float]:
    return {"qa_accuracy": summary(ranks_Q, counts_Q)["r1"]}


def action_table(ranks_Q: Ranks, counts_Q: Counts) -> dict[str, float]:
    values = summary(ranks_Q, counts_Q)
    return {"action_top1": values["r1"], "action_top5": values["r5"]}


def _questions(
    questions: list[Question], features: Tensor, videos: Tensor, score: Score
) -> tuple[Rows, list[list[int]], int]:
    """Scores of each question's options; the right ones, equal sentences among them; the most that a question has."""
    lengths = [len(question.options) for question in questions]
    options = features[: sum(lengths)].split(lengths)

    def rows(some: slice) -> Tensor:
        pairs = zip(options[some], videos[some].split(1), strict=True)
        return pad_sequence([score(*pair)[:, 0] for pair in pairs], True, -torch.inf)

    right = [[i for i, option in enumerate(q.options) if option == q.options[q.answer]] for q in questions]
    return rows, right, max(lengths)


def _classes(num_classes: int, features: Tensor, videos: Tensor, score: Score) -> Rows:
    """A class scores the mean over its templates, for two towers and for scorers alike."""
    return lambda some: score(features, videos[some]).T.unflatten(1, (num_classes, -1)).mean(-1)


def _records(url: str) -> list[tuple[int, dict[str, Any]]]:
    """The entries of a file with their numbers, from 1."""
    try:
        text = storage.read(url).decode("utf-8-sig")
        if url.endswith(".csv"):
            records: list[Any] = list(csv.DictReader(io.StringIO(text), strict=True))
        elif text.lstrip().startswith("["):
            records = json.loads(text)
        else:
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, csv.Error) as error:
        raise DataError(f"{url} cannot be read ({error}): expected {FORMS}") from None
    if not records or not all(isinstance(record, dict) for record in records):
        raise DataError(f"{url} holds no entries: expected {FORMS}")
    return list(enumerate(records, 1))


def _known(named: Collection[str], videos: Collection[str], url: str) -> dict[str, str]:
    """Ids in the split by how the file names them: by id, or by file. Raises DataError if none is there."""
    known = {}
    for name in named:
        path = PurePosixPath(name)
        video = name if name in videos or path.suffix[1:] not in VIDEO_SUFFIXES else path.stem
        if video in videos:
            known[name] = video
    missing = [name for name in named if name not in known]
    if not known:
        raise DataError(f"{url}: none of its videos ({missing[0]}, ...) is in the split: give data.test=SPLIT")
    if missing:
        log.warning("%s: %d videos are not in the split (%s, ...) and left out", url, len(missing), missing[0])
    return known
