"""What Ray does next when a worker fails, by its own code and without a cluster."""

from types import SimpleNamespace

import pytest
from ray.train import ControllerError, FailureConfig
from ray.train.v2._internal.callbacks.user_callback import UserCallbackHandler
from ray.train.v2._internal.execution.failure_handling import FailureDecision, create_failure_policy

from common.errors import DataError, StorageError, told
from training.failures import TellFailures


def after(error: Exception) -> None:
    UserCallbackHandler([TellFailures()], None).after_worker_group_poll_status(SimpleNamespace(errors={0: error}))


def test_damaged_data_ends_a_run_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Seen to fail where the callback only tells: Ray then tries again, `max_failures` times."""
    with pytest.raises(DataError) as raised:
        after(DataError("shard 3 is damaged"))
    assert capsys.readouterr().out == "rank 0: shard 3 is damaged\n"
    failure = ControllerError(raised.value)  # as the controller wraps it
    assert create_failure_policy(FailureConfig(max_failures=3)).make_decision(failure) == FailureDecision.RAISE
    assert str(told(failure)) == "shard 3 is damaged"


@pytest.mark.parametrize("error", [StorageError("the line dropped"), RuntimeError("out of memory")])
def test_what_may_pass_is_left_to_ray(error: Exception) -> None:
    after(error)
