"""What a person is told when workers fail. Apart from training.train, so that Ray's controller imports it at once."""

import logging
from typing import Any

from ray.train import UserCallback

from common.errors import told


class TellFailures(UserCallback):
    """Prints one sentence for a known fault, in place of the tracebacks that Ray's controller would log."""

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        known = {rank: error for rank, cause in worker_exceptions.items() if (error := told(cause))}
        for rank, error in known.items():
            print(f"rank {rank}: {error}", flush=True)
        if known:
            logging.getLogger("ray.train").setLevel(logging.WARNING)
