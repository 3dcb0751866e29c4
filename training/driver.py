"""What lives beside the driver of a run, on its node.

A module of its own: an actor's process imports its class's module, and that of the models takes many seconds.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from common.errors import TryAgainError


def with_driver(actor: Any, **options: Any) -> Any:
    """The actor on the driver's own node: the loss of another one does not take it away, and a crash is mended."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return actor.options(scheduling_strategy=here, max_restarts=-1, max_task_retries=-1, **options)


@ray.remote(num_cpus=0)
class _DriverMark:
    """A named actor that lives as long as its driver: the cluster's own lock on a run."""


@contextmanager
def only_driver(run: str) -> Iterator[None]:
    """Refuse a second live driver on the same run."""
    name = "driver-" + hashlib.sha256(run.encode()).hexdigest()[:16]
    try:
        mark = with_driver(_DriverMark, name=name, namespace="runs").remote()
    except ValueError:
        raise TryAgainError(
            f"run {run} is being trained by another driver right now: wait for it, or choose another name"
        ) from None
    try:
        yield
    finally:
        ray.kill(mark)
