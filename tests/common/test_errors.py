"""A user's mistake stays one sentence across processes; everything else keeps its traceback."""

import pickle
import subprocess
import sys
from typing import NoReturn

import pytest
import ray
import ray.exceptions
from ray.train import ControllerError, WorkerGroupError

from cluster.local import RayCluster
from common import errors
from common.errors import ConfigError, DataError, ProjectError, told
from tests import entry

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ProjectError)]


@pytest.mark.parametrize("kind", KINDS)
def test_errors_survive_pickling(kind: type[ProjectError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("a=1: too small")))
    assert type(copy) is kind and str(copy) == "a=1: too small"


def test_told_finds_the_root_in_real_ray_errors(ray_local: RayCluster) -> None:
    ray.init(ignore_reinit_error=True)

    @ray.remote(max_retries=0)
    def fail(inner: bool, known: bool) -> None:
        if inner:
            ray.get(fail.remote(False, known))
        raise DataError("shard 3 is damaged") if known else KeyError("shard")

    for inner in (False, True):
        with pytest.raises(ray.exceptions.RayTaskError) as raised:
            ray.get(fail.remote(inner, True))
        found = told(raised.value)
        assert type(found) is DataError and str(found) == "shard 3 is damaged"
    with pytest.raises(ray.exceptions.RayTaskError) as raised:
        ray.get(fail.remote(False, False))
    assert told(raised.value) is None


def test_told_finds_the_worker_that_knew() -> None:
    failures = {0: RuntimeError("connection closed by peer"), 1: ConfigError("optim.lr=0: too small")}
    assert str(told(WorkerGroupError("workers failed", failures))) == "optim.lr=0: too small"
    assert told(WorkerGroupError("workers failed", {0: RuntimeError("x")})) is None
    assert str(told(ControllerError(DataError("shard 3 is damaged")))) == "shard 3 is damaged"


def test_told_follows_the_cause_and_ends() -> None:
    outer = RuntimeError("outer")
    outer.__cause__ = ConfigError("inner")
    assert str(told(outer)) == "inner"
    assert told(KeyError("x")) is None
    round_about = RuntimeError("a")
    round_about.__cause__ = RuntimeError("b")
    round_about.__cause__.__cause__ = round_about
    assert told(round_about) is None


@pytest.mark.parametrize(
    ("body", "code", "err"),
    [
        ("return None", 0, ""),
        ("return 3", 3, ""),
        ("raise errors.DataError('line is empty')", 1, "error: line is empty\n"),
        ("raise KeyboardInterrupt", 130, "interrupted\n"),
        ("raise RuntimeError('x') from errors.RunError('no space')", 1, "error: no space\n"),
    ],
)
def test_exit_with(body: str, code: int, err: str) -> None:
    done = _run(body)
    assert (done.returncode, done.stderr) == (code, err)


def test_a_defect_keeps_its_traceback() -> None:
    done = _run("raise ValueError('a bug')")
    assert done.returncode != 0 and "Traceback" in done.stderr and "a bug" in done.stderr


def _run(body: str) -> "subprocess.CompletedProcess[str]":
    program = f"from common import errors\ndef main():\n    {body}\nerrors.exit_with(main)"
    return subprocess.run([sys.executable, "-c", program], cwd=entry.REPOSITORY, capture_output=True, text=True)


def test_exit_with_never_returns() -> None:
    def main() -> NoReturn:
        raise ConfigError("x")

    with pytest.raises(SystemExit) as ended:
        errors.exit_with(main)
    assert ended.value.code == 1
