"""Progress, rate-limited warnings and the head of a log line."""

import io
import logging
import re
import subprocess
import sys
import time

import pytest

from common import logs
from common.errors import ConfigError, exit_with
from tests import entry


class Clock:
    """time.monotonic that a test moves on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(logs.time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_held_back_warnings_are_counted(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    limited = logs.RateLimited(logging.getLogger("x"), every_s=10)
    for number in range(5):
        limited.warning(f"clip {number} is damaged")
    clock.now += 11
    limited.warning("clip 5 is damaged")
    clock.now += 11
    limited.warning("clip 6 is damaged")
    assert caplog.messages == ["clip 0 is damaged", "clip 5 is damaged (and 4 like it)", "clip 6 is damaged"]


def test_progress_in_a_log_is_a_line_now_and_then_and_one_at_the_end(
    clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    caplog.set_level(logging.INFO)
    done = []
    with logs.progress(range(2000), "shards", 2000) as items:
        for item in items:
            done.append(item)
            clock.now += 0.01  # 20 s in all
    assert done == list(range(2000))
    assert len(caplog.messages) == 4
    assert caplog.messages[-1] == "2,000 of 2,000 shards, 100.0/s, 0s left"
    assert "15s left" in caplog.messages[0]


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """No fixture: pytest sets sys.stderr itself when the test begins."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(logs, "BAR_EVERY_S", 0.01)
    monkeypatch.setenv("COLUMNS", "80")
    return terminal


def wait_for(terminal: Terminal, text: str) -> None:
    deadline = time.monotonic() + 60
    while text not in terminal.getvalue():
        assert time.monotonic() < deadline, terminal.getvalue()
        time.sleep(0.01)


def test_progress_on_a_terminal_is_one_bar_that_moves_while_an_item_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    with logs.progress(range(4), "clips", 4, lambda: "some more") as items:
        for i in items:
            wait_for(terminal, f"{i} of 4 clips")
    shown = terminal.getvalue()
    assert shown.count("\n") == 1 and shown.endswith("\n")
    assert "[" + " " * 30 + "] 0 of 4 clips, 0s so far" in shown
    last = shown.rpartition("\r\033[K")[2]
    assert last.startswith("[" + "#" * 30 + "] 4 of 4 clips") and last.endswith("0s left, some more\n")


def test_a_bar_is_never_wider_than_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    with logs.progress(range(1), "clips", 1, lambda: "more " * 40) as items:
        list(items)
    lines = terminal.getvalue().replace("\n", "").split("\r\033[K")
    assert max(map(len, lines)) == 79


def test_an_error_or_a_log_line_is_not_written_behind_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    logs.setup()
    with pytest.raises(SystemExit), logs.progress(range(9), "clips", 9) as items:
        next(items)
        wait_for(terminal, "0 of 9")
        logging.getLogger("common").warning("slow")
        exit_with(failing)
    shown = terminal.getvalue()
    assert "\r\033[Kerror: no\n" in shown and re.search(r"\r\033\[K\S+ \S+ WARNING slow\n", shown)
    assert shown.endswith("\n")


def failing() -> int:
    raise ConfigError("no")


def test_progress_of_nothing_and_of_fewer_than_promised(caplog: pytest.LogCaptureFixture) -> None:
    with logs.progress([], "clips", 0) as none, logs.progress([1], "clips", 5) as one:
        assert list(none) == [] and list(one) == [1]
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (185, "3m05s"), (7620, "2h07m"), (1e5, "27h46m")]
)
def test_duration(seconds: float, text: str) -> None:
    assert logs.duration(seconds) == text


def test_a_line_names_job_and_rank_and_libraries_keep_quiet() -> None:
    program = (
        "import logging; from common import logs; logs.setup(rank=3)\n"
        "logging.getLogger('training.loop').info('hello')\n"
        "logging.getLogger('botocore').info('chatter')"
    )
    job = '{"runtime_env": {}, "metadata": {"job_submission_id": "raysubmit_1"}}'
    env = {"RAY_JOB_CONFIG_JSON_ENV_VAR": job, "PATH": "/usr/bin:/bin"}
    command = [sys.executable, "-c", program]
    lines = subprocess.run(command, cwd=entry.REPOSITORY, env=env, capture_output=True, text=True).stderr.splitlines()
    assert len(lines) == 1
    assert "raysubmit_1" in lines[0] and "rank 3 INFO hello" in lines[0]
