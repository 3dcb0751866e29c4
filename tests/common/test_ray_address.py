"""A wrong RAY_ADDRESS is told in one sentence, not after minutes and by a traceback."""

import socket

import pytest

from common import ray_address
from common.errors import RunError


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "127.0.0.1:port"])
def test_where_nothing_listens_ray_is_not_even_asked(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    told = f"no Ray cluster at RAY_ADDRESS={address} .*: correct it, or unset it"
    with pytest.raises(RunError, match=told), ray_address.checked():
        pytest.fail("ray.init")


def test_something_else_listens_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{server.getsockname()[1]}")
        told = r"no Ray cluster at RAY_ADDRESS=.*Failed to connect"
        with pytest.raises(RunError, match=told), ray_address.checked():
            raise ConnectionError("Failed to connect to Ray cluster")


@pytest.mark.parametrize("address", ["", "auto", "local"])
def test_what_is_no_address_is_left_to_ray(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    with ray_address.checked():
        pass


def test_without_an_address_a_fault_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConnectionError, match="ours"), ray_address.checked():
        raise ConnectionError("ours")
