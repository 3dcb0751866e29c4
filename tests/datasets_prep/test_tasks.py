"""Ray tasks that fail as nodes, storage and files do."""

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from common import retry
from common.errors import DataError, StorageError
from datasets_prep import tasks

pytestmark = pytest.mark.usefixtures("ray_local")
FAILURES: dict[str, Callable[[], object]] = {
    "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "storage": lambda: _raise(StorageError("no answer")),
    "file": lambda: _raise(DataError("bad file")),
    "defect": lambda: _raise(ZeroDivisionError("ours")),
}


def _raise(error: Exception) -> None:
    raise error


def work(folder: str, name: str, how: str, times: int) -> str:
    """Fail the first `times` times; each attempt is a file in `folder`."""
    attempt = len(list(Path(folder).glob(f"{name}-*")))
    Path(folder, f"{name}-{attempt}").touch()
    if attempt < times:
        FAILURES[how]()
    return name


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)


def run(folder: Path, how: str, times: int) -> list[str]:
    names = ["a", "b", "c"]
    failing = {"b": times}
    calls = tasks.run(work, names, lambda i: (str(folder), names[i], how, failing.get(names[i], 0)), workers=2)
    return sorted(calls)


@pytest.mark.parametrize("how", ["killed", "storage"])
def test_a_fault_of_the_node_or_the_storage_is_tried_again(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert run(tmp_path, how, 2) == ["a", "b", "c"]
    assert len([r for r in caplog.records if r.message.startswith("b: ") and "again in" in r.message]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-0", "b-0", "b-1", "b-2", "c-0"]


def test_but_not_for_ever(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"^b could not be made in 5 attempts \(no answer\): run again to go on$"):
        run(tmp_path, "storage", 99)
    assert len(list(tmp_path.glob("b-*"))) == retry.ATTEMPTS


@pytest.mark.parametrize(("how", "error"), [("file", DataError), ("defect", ZeroDivisionError)])
def test_what_another_attempt_would_not_change_ends_at_once(tmp_path: Path, how: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        run(tmp_path, how, 99)
    assert len(list(tmp_path.glob("b-*"))) == 1


def test_no_more_at_once_than_asked(tmp_path: Path) -> None:
    def alone(folder: str) -> int:
        import time

        mine = Path(folder, str(os.getpid()) + os.urandom(4).hex())
        mine.touch()
        time.sleep(0.3)
        there = len(list(Path(folder).iterdir()))
        mine.unlink()
        return there

    assert set(tasks.run(alone, list("abcd"), lambda _: (str(tmp_path),), workers=1)) == {1}
