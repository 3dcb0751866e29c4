"""Patience with storage: a run of days is not lost to a minute without it."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from common import counts
from common.errors import NoSpaceError, NotFoundError, StorageError

T = TypeVar("T")
log = logging.getLogger(__name__)
ATTEMPTS = 5
FIRST_WAIT_S = 5.0  # before the second attempt, then twice as long each time: 75 s in all


def wait_s(failures: int) -> float:
    """Seconds to wait after so many failures."""
    return FIRST_WAIT_S * 2 ** (failures - 1)


def again(act: Callable[[], T]) -> T:
    """`act()`, tried `ATTEMPTS` times as long as it raises StorageError.

    What does not exist, and room on a full disk, are not waited for.
    """
    for failures in range(1, ATTEMPTS):
        try:
            return act()
        except (NotFoundError, NoSpaceError):
            raise
        except StorageError as error:
            log.warning("%s; again in %.0f s", error, wait_s(failures))
            counts.so_far["retries"] += 1
            time.sleep(wait_s(failures))
    return act()
