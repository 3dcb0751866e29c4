"""Multiple choice and action recognition: on constructed vectors, and with models against their own scores."""

import json
import logging
from pathlib import Path

import pytest
import torch

from common.errors import DataError
from tests.training.test_methods import SCORED, build, config_of, pixels
from tests.training.test_metrics import infos
from training import choices, models
from training.choices import Choices, Question, read_labels, read_questions
from training.data.loader import EvalBatch
from training.encode import evaluation
from training.models import TextOut
from training.ranking import cosines

TEMPLATES = ["{}", "a video of {}."]


def asked(questions: list[Question] | None = None, labels: dict[str, int] | None = None) -> Choices:
    return Choices(questions or [], labels or {}, ["jump", "run", "swim"] if labels else [], TEMPLATES)


def metrics(asked: Choices, features: list[list[float]], videos: list[list[float]]) -> dict[str, float]:
    ids = infos(*(str(i) for i in range(len(videos))))
    parts = choices.measure(asked, torch.tensor(features), torch.tensor(videos), ids, cosines)
    return {name: value for part in parts for name, value in part.metrics().items()}


def test_accuracy_counts_right_answers_and_no_ties() -> None:
    """Seen to fail with the options of one question for all."""
    questions = [
        Question("0", ["a", "b"], 0),  # right
        Question("1", ["c", "d", "e"], 2),  # wrong
        Question("1", ["f", "g"], 1),  # a tie is no answer
        Question("1", ["h", "h", "i"], 1),  # two times the right sentence
    ]
    features = [[1.0, 0], [0, 1], [0, 1], [1, 0], [0, 0.5], [0, 1], [0, 1], [0, 1], [0, 1], [1, 0]]
    assert asked(questions).sentences == list("abcdefghhi")
    assert metrics(asked(questions), features, [[1.0, 0], [0, 1.0]]) == {"qa_accuracy": 50}


def test_classes_are_ranked_by_the_mean_of_their_templates() -> None:
    """Seen to fail with the best template instead of the mean."""
    given = asked(labels={"0": 0, "2": 1})
    assert given.sentences[:3] == ["jump", "a video of jump.", "run"]
    features = [[0.6, 0.0], [0.6, 0], [1.0, 0], [0, 1], [0, 0], [0, 0]]
    # Video 0: jump 0.6, run 0.5; video 2: run 0.5, jump and swim 0.
    assert metrics(given, features, [[1.0, 0], [0, 0], [0, 1]]) == {"action_top1": 100, "action_top5": 100}
    worse = asked(labels={"0": 1, "2": 1})
    assert metrics(worse, features, [[1.0, 0], [0, 0], [0, 1]]) == {"action_top1": 50, "action_top5": 100}


@pytest.mark.parametrize("method", ["mean_pool", *SCORED])
def test_models_of_both_kinds_answer_as_their_scores_say(method: str) -> None:
    model, frames = build(method).float().eval(), pixels(6).float()
    config = config_of(method)
    tokenize = models.tokenize(config.model)
    questions = [Question(str(v), [f"sentence {v} {n}" for n in range(5)], v % 5) for v in (5, 3, 0, 3)]
    given = asked(questions, {"1": 2, "4": 0, "5": 1})
    with torch.no_grad():
        # Two batches, as of two ranks' loaders.
        batches = [EvalBatch(frames[:4], infos(*"abcd")), EvalBatch(frames[4:], infos(*"abcdef")[4:])]
        found = evaluation(model, batches, tokenize, config.eval, torch.device("cpu"), given)
        keys = model.key(model.towers.encode_video(frames))

        def score(sentence: str, video: int) -> float:
            text: TextOut = model.towers.encode_text(tokenize([sentence]))
            return float(model.score(model.query(text), keys[[video]]))

        answers = [[score(option, int(q.video)) for option in q.options] for q in questions]
        classes = {
            int(v): [sum(score(t.replace("{}", name), int(v)) for t in TEMPLATES) / 2 for name in given.classes]
            for v in given.labels
        }
    right = [max(scores) == scores[q.answer] for scores, q in zip(answers, questions, strict=True)]
    assert found.metrics["qa_accuracy"] == 100 * sum(right) / 4
    best = [max(scores) == scores[given.labels[str(v)]] for v, scores in classes.items()]
    assert found.metrics["action_top1"] == pytest.approx(100 * sum(best) / 3)
    qa, action = found.measured[-2:]
    assert qa.videos_Q.tolist() == [5, 3, 0, 3] and action.videos_Q.tolist() == [1, 4, 5]
    ranks = [1 + sum(s > scores[q.answer] for s in scores) for scores, q in zip(answers, questions, strict=True)]
    assert qa.ranks_Q.tolist() == ranks


def write(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def test_questions_are_read_in_the_forms_that_are_around(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = [Question("video1", ["a, b", "c"], 1), Question("video2", ["d", "e"], 0)]
    objects = [
        {"video": "video1.mp4", "caption": ["a, b", "c"], "answer": 1},
        {"video_id": "video2", "options": ["d", "e"], "answer": 0, "question_id": 7},
    ]
    lines = "\n".join(map(json.dumps, objects)) + "\n"
    table = 'video,answer,first,second\nvideo1.mp4,1,"a, b",c\nvideo2,0,d,e\n'
    for name, content in {"a.json": objects, "a.jsonl": lines, "a.csv": table}.items():
        assert read_questions(write(tmp_path / name, content), {"video1", "video2"}) == expected
    with caplog.at_level(logging.WARNING):
        assert read_questions(str(tmp_path / "a.json"), {"video2"}) == expected[1:]
    assert "1 videos are not in the split (video1.mp4, ...) and left out" in caplog.text


def test_labels_name_the_classes_also_of_videos_that_are_not_there(tmp_path: Path) -> None:
    url = write(tmp_path / "labels.csv", "video,label\na,run\nb.avi,jump\nc,swim\n")
    assert read_labels(url, {"a", "b"}) == ({"a": 1, "b": 0}, ["jump", "run", "swim"])


@pytest.mark.parametrize(
    ("read", "name", "content", "message"),
    [
        (read_questions, "q.json", "{", "cannot be read"),
        (read_questions, "q.json", "[]", "holds no entries: expected a .csv file"),
        (read_questions, "q.json", [{"video": "a", "options": ["x", "y"], "answer": 2}], "entry 1 is no question"),
        (read_questions, "q.csv", "video,answer,x\na,0,only one\n", "entry 1 is no question"),
        (read_questions, "q.json", [{"video": "z", "options": ["x", "y"], "answer": 1}], r"none of its videos \(z,"),
        (read_labels, "l.csv", "video,label\na,\n", "entry 1 has no video and label"),
        (read_labels, "l.csv", "video,label\na,run\n", "one class only"),
    ],
)
def test_a_wrong_file_is_told_in_one_sentence(tmp_path: Path, read, name: str, content: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / name, content), {"a"})
