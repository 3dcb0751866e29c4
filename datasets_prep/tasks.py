"""Ray tasks that each make one file: a bounded number at once, tried again where a node or the storage was at fault."""

import heapq
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
import ray.exceptions

from common import ray_address, retry
from common.errors import ConfigError, RunError, StorageError, told

T = TypeVar("T")
log = logging.getLogger(__name__)


def run(
    function: Callable[..., T],
    names: Sequence[str],
    arguments: Callable[[int], tuple[Any, ...]],
    workers: int | None = None,
    cpus: int = 1,
) -> Iterator[T]:
    """What `function(*arguments(i))` returns for each of `names`, as it is finished, across the cluster's nodes.

    Ray itself retries nothing: a task whose worker or node died, or whose storage failed, waits and is tried again.

    Args:
        names: what the log and an error call each task.
        arguments: asked for when a task begins, so that those of all need not be in memory.
        workers: most tasks at once; None = as many as the cluster has room for.
        cpus: that Ray reserves for a task.

    Raises:
        ConfigError: `cpus` is more than any node has.
        RunError, StorageError: there is no cluster at RAY_ADDRESS, or a task failed `retry.ATTEMPTS` times.
        DataError and others: what `function` raised.
    """
    if not names:
        return
    if not ray.is_initialized():
        with ray_address.checked():
            ray.init(logging_level=logging.WARNING)
    task = ray.remote(function).options(num_cpus=cpus, max_retries=0, scheduling_strategy="SPREAD")
    waiting = [(0.0, place) for place in range(len(names))]  # a heap: when it may begin, which
    failures: Counter[int] = Counter()
    running: dict[Any, int] = {}
    if not _room(cpus):
        raise ConfigError(
            f"a task of {cpus} CPUs fits on no Ray node: lower cpus_per_task, or video.threads without it"
        )
    while waiting or running:
        limit = min(workers or sys.maxsize, max(1, _room(cpus)))  # nodes come and go
        while waiting and len(running) < limit and waiting[0][0] <= time.monotonic():
            _, place = heapq.heappop(waiting)
            running[task.remote(*arguments(place))] = place
        if not running:
            time.sleep(max(0.0, waiting[0][0] - time.monotonic()))
            continue
        finished, _ = ray.wait(list(running), timeout=5.0 if waiting else None)
        for reference in finished:
            place = running.pop(reference)
            try:
                yield ray.get(reference)
            except ray.exceptions.RayError as error:
                failures[place] += 1
                wait_s = retry.wait_s(failures[place])
                reason = _temporary(error, names[place], is_last=failures[place] == retry.ATTEMPTS)
                log.warning("%s: %s; again in %.0f s", names[place], reason, wait_s)
                heapq.heappush(waiting, (time.monotonic() + wait_s, place))


def _temporary(error: ray.exceptions.RayError, name: str, is_last: bool) -> str:
    """Why a task failed, if it may succeed on another attempt; raises what is to be told if not."""
    known = told(error)
    if known is None and isinstance(error, ray.exceptions.RayTaskError):
        raise error  # a defect of ours keeps its traceback
    reason = str(known or error).strip().splitlines()[0]
    if known is not None and not isinstance(known, RunError | StorageError):
        raise known
    if is_last:
        kind = type(known) if known else RunError
        raise kind(f"{name} could not be made in {retry.ATTEMPTS} attempts ({reason}): run again to go on") from None
    return reason


def _room(cpus: int) -> int:
    """How many tasks the cluster holds now."""
    return sum(int(node["Resources"].get("CPU", 0)) // cpus for node in ray.nodes() if node["Alive"])
