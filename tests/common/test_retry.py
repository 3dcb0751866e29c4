"""A fault of the storage is waited out; what is not there is not."""

import pytest

from common import counts, retry
from common.errors import NoSpaceError, NotFoundError, StorageError


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    slept: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", slept.append)
    counts.take()
    return slept


class Fails:
    """Raises `error` the first `times` times."""

    def __init__(self, error: Exception, times: int) -> None:
        self.error, self.times, self.calls = error, times, 0

    def __call__(self) -> str:
        self.calls += 1
        if self.calls <= self.times:
            raise self.error
        return "there"


def test_waits_longer_each_time(waits: list[float]) -> None:
    act = Fails(StorageError("down"), 4)
    assert retry.again(act) == "there"
    assert waits == [5, 10, 20, 40] and act.calls == retry.ATTEMPTS
    assert counts.take()["retries"] == 4


def test_gives_up(waits: list[float]) -> None:
    act = Fails(StorageError("down"), 99)
    with pytest.raises(StorageError, match="down"):
        retry.again(act)
    assert act.calls == retry.ATTEMPTS


@pytest.mark.parametrize("error", [NotFoundError("gone"), NoSpaceError("full"), ZeroDivisionError("ours")])
def test_what_waiting_would_not_change_is_raised_at_once(error: Exception, waits: list[float]) -> None:
    act = Fails(error, 99)
    with pytest.raises(type(error)):
        retry.again(act)
    assert (act.calls, waits) == (1, [])
