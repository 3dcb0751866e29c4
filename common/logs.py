"""Logging with node and rank, rate-limited warnings, and progress on a terminal or in a log file."""

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
LINE_EVERY_S = 5.0
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
        format=f"%(asctime)s {who} %(levelname)s %(message)s",
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


def progress(items: Iterable[T], what: str, total: int, more: Callable[[], str] = str) -> Iterator[T]:
    """Yield `items`; show a bar on a terminal, else a line every few seconds and one at the end.

    Args:
        what: the thing counted, in the plural ("shards").
        total: how many there will be.
        more: asked for what else there is to say each time something is shown.
    """
    terminal = sys.stderr.isatty()
    start = shown = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if done == total or now - shown >= (0.1 if terminal else LINE_EVERY_S):
            shown = now
            rate = done / max(now - start, 1e-9)
            pace = f"{rate:,.1f}/s" if rate >= 1 else f"{1 / rate:,.1f} s each"
            text = f"{done:,} of {total:,} {what}, {pace}, {duration(max(total - done, 0) / rate)} left"
            text = ", ".join(filter(None, [text, more()]))
            if terminal:
                bar = "#" * round(30 * done / max(total, 1))
                sys.stderr.write(f"\r[{bar:<30}] {text}\033[K" + ("\n" if done == total else ""))
                sys.stderr.flush()
            else:
                logging.getLogger("progress").info(text)


def duration(seconds: float) -> str:
    """`seconds` as people write it: 42s, 3m05s, 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
