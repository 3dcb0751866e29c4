"""Is there a Ray cluster where RAY_ADDRESS says? Light: Ray itself is not imported."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from common.errors import RunError


@contextmanager
def checked() -> Iterator[None]:
    """Around `ray.init`, which would try for many minutes where nothing answers, and then show a traceback.

    Raises:
        RunError: there is no cluster at RAY_ADDRESS.
    """
    address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and "/" not in host:
            socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise _no_cluster(address, error) from None
    try:
        yield
    except ConnectionError as error:  # what listens there is something else
        raise (_no_cluster(address, error) if address else error) from None


def _no_cluster(address: str, error: Exception) -> RunError:
    return RunError(f"no Ray cluster at RAY_ADDRESS={address} ({error}): correct it, or unset it")
