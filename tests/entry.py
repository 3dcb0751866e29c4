"""Run an entry point as a user does: `python -m MODULE arguments` in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]


class Finished(NamedTuple):
    """Exit code and everything printed, stdout and stderr apart."""

    code: int
    out: str
    err: str


def run(
    module: str, *arguments: str, env: Mapping[str, str] | None = None, cwd: Path = REPOSITORY, timeout_s: float = 300
) -> Finished:
    """Run `python -m module arguments` from the repository, with `env` on top of this process's environment."""
    search = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": search, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    return Finished(done.returncode, done.stdout, done.stderr)


def assert_refused(finished: Finished, *words: str) -> None:
    """One sentence with all of `words` on stderr, exit code not 0, no traceback."""
    assert finished.code != 0, finished
    assert "Traceback" not in finished.out + finished.err, finished.err
    errors = [line for line in finished.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, finished.err
    for word in words:
        assert word in errors[0], errors[0]
