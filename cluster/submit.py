"""Run a command of this project on a Ray cluster.

    python -m cluster.submit -- python -m training.train PRESET key=value ...

The configuration is checked here first, so a typo never reaches the cluster. What travels is the repository's
git-tracked files as they lie here, uncommitted changes included. The job's log is followed; the exit code is 0 only if
the job SUCCEEDED. RAY_API_SERVER_ADDRESS names the cluster (and RAY_AUTH_TOKEN_PATH its token); credentials for
storage belong into the environment of its nodes.
"""

import asyncio
import difflib
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import COMMANDS
from common import config as configs
from common import logs
from common.errors import ConfigError, RunError, exit_with
from tuning.config import StudyConfig
from tuning.space import resolve

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

REPOSITORY = Path(__file__).parents[1]
USAGE = "python -m cluster.submit -- python -m PACKAGE.MODULE PRESET [key.path=value ...]"

log = logging.getLogger(__name__)


def check(command: Sequence[str], tracked: Sequence[str]) -> None:
    """Refuse a command whose module, preset or configuration is wrong, or would not travel.

    Args:
        tracked: the files that travel, relative to the repository.

    Raises:
        ConfigError: in one sentence. A command that is none of this project's passes as it is.
    """
    if len(command) < 3 or not re.fullmatch(r"python[\d.]*", command[0]) or command[1] != "-m":
        return
    module, arguments = command[2], command[3:]
    modules = {path.removesuffix(".py").replace("/", "."): path for path in tracked if path.endswith(".py")}
    if module not in modules and any(name.startswith(module.split(".")[0] + ".") for name in modules):
        close = difflib.get_close_matches(module, modules, n=1)
        raise ConfigError(
            f"there is no module {module!r} among the git-tracked files"
            + (f", did you mean {close[0]!r}?" if close else ": git add it, or correct its name")
        )
    if module not in COMMANDS:
        return
    if not arguments:
        raise ConfigError(f"no preset given: python -m {module} PRESET [key.path=value ...]")
    schema, presets, paths = COMMANDS[module]
    config = configs.load(schema, arguments[0], arguments[1:], presets)
    if isinstance(config, StudyConfig):
        resolve(config)
    configs.refuse_relative(config, *paths)
    _check_travels(arguments[0], presets, tracked)


def _check_travels(preset: str, presets: Path, tracked: Sequence[str]) -> None:
    if "://" in preset or Path(preset).is_absolute():  # the user's word that the cluster can read it
        return
    is_path = "/" in preset or preset.endswith((".yaml", ".yml"))
    path = Path(preset).absolute() if is_path else presets / f"{preset}.yaml"
    if str(path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path) not in tracked:
        raise ConfigError(f"preset {path.name} is not tracked by git, so it would not reach the cluster: git add it")


def tracked_files() -> list[str]:
    """The repository's git-tracked files that exist, relative to it. Raises ConfigError outside a git checkout."""
    files = [name for name in _git("ls-files", "-z", "--cached") if (REPOSITORY / name).is_file()]
    if not files:
        raise ConfigError(f"git tracks no file in {REPOSITORY}: git add the files that the job needs")
    return files


def _git(*arguments: str) -> list[str]:
    try:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", b"").decode(errors="replace").strip() or str(error)
        raise ConfigError(
            f"cannot list the repository's files ({reason.splitlines()[0]}): submit from a git checkout, "
            "or use ray job submit --working-dir ."
        ) from None
    return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]


def submit(command: Sequence[str]) -> str:
    """Check `command` and start it as a job; returns the job's id.

    Raises:
        ConfigError, RunError: the command is refused here, or the cluster cannot be reached.
    """
    files = tracked_files()
    check(command, files)
    client = connect()
    untracked = _git("ls-files", "-z", "--others", "--exclude-standard")
    if untracked:
        log.warning("%d files are not tracked by git and stay here: %s", len(untracked), ", ".join(untracked[:5]))
    with tempfile.TemporaryDirectory() as folder:
        for name in files:
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(REPOSITORY / name, target)
        size = sum((Path(folder) / name).stat().st_size for name in files)
        log.info("sending %d files, %s bytes, to %s", len(files), f"{size:,}", client.get_address())
        try:
            # The folder holds what shall travel: a file that is tracked and ignored too must not get lost.
            os.environ["RAY_RUNTIME_ENV_IGNORE_GITIGNORE"] = "1"
            job = client.submit_job(entrypoint=shlex.join(command), runtime_env={"working_dir": folder})
        except (RuntimeError, OSError, ValueError) as error:
            raise RunError(f"the cluster refused the job: {_first_line(error)}") from None
    log.info("job %s is submitted; Ctrl-C ends this view only, ray job stop %s ends the job", job, job)
    return job


def connect() -> "JobSubmissionClient":
    """The job server at RAY_API_SERVER_ADDRESS. Raises ConfigError if it is unset, RunError if it can't be used."""
    address = os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise ConfigError("RAY_API_SERVER_ADDRESS is not set: give the dashboard's URL, such as http://HOST:8265")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise RunError(
            f"the cluster at {address} refused this client: {_first_line(error.message)}; "
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        ) from None
    except (RuntimeError, OSError, ValueError) as error:
        raise RunError(f"no job server at {address}: {_first_line(error)}") from None


def follow(job: str) -> None:
    """Print the job's log until it ends. Raises RunError unless it SUCCEEDED (also if somebody stopped it)."""
    client = connect()
    shown = 0

    async def tail() -> None:
        """Each connection sends the log from its beginning; print what is new."""
        nonlocal shown
        received = 0
        async for text in client.tail_job_logs(job):
            print(text[max(shown - received, 0) :], end="", flush=True)
            received += len(text)
            shown = max(shown, received)

    try:
        while not (status := client.get_job_status(job)).is_terminal():
            try:
                asyncio.run(tail())
            except (RuntimeError, OSError) as error:
                log.warning("the log broke off: %s", _first_line(error))
            time.sleep(1)
        asyncio.run(tail())
        message = client.get_job_info(job).message or "no reason given"
    except (RuntimeError, OSError) as error:
        reason = _first_line(error)
        raise RunError(f"lost sight of job {job} ({reason}); it may go on: ray job status {job}") from None
    if status != "SUCCEEDED":
        raise RunError(f"job {job} {status.value}: {_first_line(message)}")
    log.info("job %s SUCCEEDED", job)


def _first_line(text: object) -> str:
    return next(iter(str(text).strip().splitlines()), "")


def main() -> int:
    arguments = sys.argv[1:]
    if "--help" in arguments[:1] or "-h" in arguments[:1]:
        print(f"{USAGE}\n\n{__doc__}")
        return 0
    if arguments[:1] == ["--"]:
        arguments = arguments[1:]
    if not arguments:
        raise ConfigError(f"no command given: {USAGE}")
    logs.setup()
    follow(submit(arguments))
    return 0


if __name__ == "__main__":
    exit_with(main)
