"""Logging with node and rank, rate-limited warnings, and progress on a terminal or in a log file."""

import json
import logging
import os
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
LINE_EVERY_S, BAR_EVERY_S = 5.0, 0.25
OURS = ("__main__", "progress", "common", "datasets_prep", "training", "retrieval", "tuning", "cluster")


def setup(rank: int | None = None) -> None:
    """Send this process's log to stderr, each line with time, node and, for a worker, its rank.

    Ray puts its own handlers on worker processes; ours replaces the root handler only.
    """
    who = socket.gethostname() if rank is None else f"{socket.gethostname()} rank {rank}"
    # How Ray tells a submitted job's driver who it is.
    job = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")).get("metadata", {}).get("job_submission_id")
    if job:
        who = f"{job} {who}"
    logging.basicConfig(
        level=logging.WARNING,
        format=f"{new_line()}%(asctime)s {who} %(levelname)s %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )
    for ours in OURS:
        logging.getLogger(ours).setLevel(os.environ.get("LOG_LEVEL", "INFO"))


class RateLimited:
    """A warning that may be called at any rate and prints at most every `every_s` seconds.

    What was held back is counted in the next line, so nothing is dropped in silence.
    """

    def __init__(self, logger: logging.Logger, every_s: float = 10.0) -> None:
        self.logger, self.every_s = logger, every_s
        self.next_at, self.held = 0.0, 0

    def warning(self, message: str) -> None:
        now = time.monotonic()
        if now < self.next_at:
            self.held += 1
            return
        more = f" (and {self.held} like it)" if self.held else ""
        self.logger.warning("%s%s", message, more)
        self.next_at, self.held = now + self.every_s, 0


def new_line() -> str:
    """What begins a line on stderr: on a terminal it clears the bar that may stand there."""
    return "\r\033[K" if sys.stderr.isatty() else ""


@contextmanager
def progress(items: Iterable[T], what: str, total: int, more: Callable[[], str] = str) -> Iterator[Iterator[T]]:
    """`items`, counted as they are done: a bar on a terminal, else a line every few seconds and one at the end.

    Args:
        what: the thing counted, in the plural ("shards").
        total: how many there will be.
        more: asked for what else there is to say each time something is shown.
    """
    line = _Line(what, total, more)
    if not sys.stderr.isatty() or not total:
        yield line.counted(items)
        return
    ended = threading.Event()
    # An item may take minutes, in which the time goes on.
    ticker = threading.Thread(target=line.draw, args=[ended], daemon=True)
    ticker.start()
    try:
        yield line.counted(items)
    finally:
        ended.set()
        ticker.join()


class _Line:
    """How far something is."""

    def __init__(self, what: str, total: int, more: Callable[[], str]) -> None:
        self.what, self.total, self.more = what, total, more
        self.done = 0
        self.start = self.shown = time.monotonic()

    def counted(self, items: Iterable[T]) -> Iterator[T]:
        for item in items:
            yield item
            self.done += 1
            now = time.monotonic()
            is_due = self.done == self.total or now - self.shown >= LINE_EVERY_S
            if is_due and not sys.stderr.isatty():
                self.shown = now
                logging.getLogger("progress").info(str(self))

    def draw(self, ended: threading.Event) -> None:
        """The bar, until it has ended."""
        is_over = False
        while not is_over:
            is_over = ended.wait(BAR_EVERY_S)
            # A line that goes on in the terminal's next can't be drawn over.
            most, text = shutil.get_terminal_size().columns - 1, str(self)
            width = min(30, max(5, most - 3 - len(text)))
            bar = "#" * round(width * self.done / self.total)
            sys.stderr.write(new_line() + f"[{bar:<{width}}] {text}"[:most] + ("\n" if is_over else ""))
            sys.stderr.flush()

    def __str__(self) -> str:
        elapsed = time.monotonic() - self.start
        counted = f"{self.done:,} of {self.total:,} {self.what}"
        if not self.done:
            return f"{counted}, {duration(elapsed)} so far"
        rate = self.done / max(elapsed, 1e-9)
        pace = f"{rate:,.1f}/s" if rate >= 1 else f"{1 / rate:,.1f} s each"
        left = f"{duration(max(self.total - self.done, 0) / rate)} left"
        return ", ".join(filter(None, [counted, pace, left, self.more()]))


def duration(seconds: float) -> str:
    """`seconds` as people write it: 42s, 3m05s, 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
