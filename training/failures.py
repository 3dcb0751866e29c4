"""What a person is told when workers fail. Apart from training.train, so that Ray's controller imports it at once."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.train import UserCallback

from common.errors import DataError, ProjectError, told


class TellFailures(UserCallback):
    """Prints one sentence for a known fault, in place of the tracebacks that Ray's controller would log.

    Damaged data ends the run: no other start would find it whole. Ray tries again whatever a worker raises, but not
    what its controller meets.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        known = {rank: error for rank, cause in worker_exceptions.items() if (error := told(cause))}
        for rank, error in known.items():
            print(f"rank {rank}: {error}", flush=True)
        if known:
            logging.getLogger("ray.train").setLevel(logging.WARNING)
        for error in known.values():
            if isinstance(error, DataError):
                logging.getLogger("ray.train").setLevel(logging.CRITICAL)
                raise error


@contextmanager
def without_traceback() -> Iterator[None]:
    """In a worker: Ray does not log the traceback of a ProjectError; TellFailures tells it."""
    try:
        yield
    except ProjectError:
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)
        raise
