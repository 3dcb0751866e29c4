"""Run a command of this project on a Ray cluster, and look after what runs there.

    python -m cluster.submit [CLUSTER] [options] -- python -m training.train PRESET key=value ...
    python -m cluster.submit list [CLUSTER]
    python -m cluster.submit status|logs|stop|resume JOB [CLUSTER]

The configuration is checked here first, so a typo never reaches the cluster, and travels resolved: what runs is what
was checked. What else travels is the repository's git-tracked files as they lie here, uncommitted changes included. The
log is followed; the exit code is 0 only if the job SUCCEEDED. `resume` submits a job's command once more, with the code
as it lies here now: a run, build or study of the same name goes on where it stopped.

CLUSTER is the address of its dashboard, http://HOST:8265 (default: RAY_API_SERVER_ADDRESS); RAY_AUTH_TOKEN_PATH names
its token. Credentials for storage belong into the environment of its nodes, or are their role.
"""

import argparse
import logging
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from cluster import package
from cluster.jobs import asked, connect, first_line, follow, listing
from cluster.package import Command
from common import logs
from common.errors import ConfigError, RunError, exit_with
from training.config import TrainConfig
from tuning.config import StudyConfig

USAGE = "python -m cluster.submit [CLUSTER] [options] -- python -m PACKAGE.MODULE PRESET [key.path=value ...]"
VERBS = ("status", "logs", "stop", "resume", "list")
SECRET = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|(^|_)KEY|(ACCESS|API)_?KEY", re.IGNORECASE)

log = logging.getLogger(__name__)


def submit(
    words: Sequence[str],
    cluster: str | None = None,
    job: str | None = None,
    env: Sequence[str] = (),
    extra: Sequence[str] = (),
) -> str:
    """Check a command and start it as a job; returns the job's id.

    Args:
        job: its id; None makes one of the command's name and the time.
        env: names of variables of this process that the job gets. Anybody who sees the dashboard sees their values.
        extra: files and folders of the repository that travel though git does not track them.

    Raises:
        ConfigError, RunError: the command is refused here, or the cluster cannot be reached.
    """
    files = sorted({*package.tracked_files(), *package.named_files(extra)})
    command = package.check(words, files)
    values = _variables(env)
    client = connect(cluster)
    behind = sorted(set(package.untracked_files()) - set(files))
    if behind:
        log.warning("%d files are not tracked by git and stay here: %s", len(behind), ", ".join(behind[:5]))
    with tempfile.TemporaryDirectory() as folder:
        size = package.pack(command, files, Path(folder))
        log.info("sending %d files, %s bytes, to %s", len(files), f"{size:,}", client.get_address())
        try:
            # The folder holds what shall travel: a file that is tracked and ignored too must not get lost.
            os.environ["RAY_RUNTIME_ENV_IGNORE_GITIGNORE"] = "1"
            started: str = client.submit_job(
                entrypoint=shlex.join(command.frozen),
                submission_id=job or _id(command),
                runtime_env={"working_dir": folder, "env_vars": values},
                metadata={"command": shlex.join(words), "env": shlex.join(env), "with": shlex.join(extra)},
            )
        except (RuntimeError, OSError, ValueError) as error:
            raise RunError(f"the cluster refused the job: {first_line(error)}") from None
    log.info("job %s is submitted; Ctrl-C ends this view only, cluster.submit stop %s ends the job", started, started)
    return started


def resume(job: str, cluster: str | None = None) -> str:
    """Submit an ended job's command once more, under an id of its own; returns that. Raises RunError."""
    client = connect(cluster)
    info = asked(lambda: client.get_job_info(job), job)
    if not info.status.is_terminal():
        raise RunError(f"job {job} is {info.status.value}: stop it first, or follow it with cluster.submit logs {job}")
    kept = info.metadata or {}
    if "command" not in kept:
        raise RunError(f"job {job} was not submitted by cluster.submit, so its command is not known: submit it anew")
    words, env, extra = (shlex.split(kept[name]) for name in ("command", "env", "with"))
    return submit(words, cluster, env=env, extra=extra)


def _id(command: Command) -> str:
    """What is told apart at a glance in a list of jobs: module, name of the run or study, time."""
    name = None
    if isinstance(command.config, TrainConfig):
        name = command.config.run.name
    elif isinstance(command.config, StudyConfig):
        name = command.config.name
    module = command.words[2].rpartition(".")[2] if command.config is not None else "job"
    parts = [module, *([name] if name else []), datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")[:-3]]
    return re.sub(r"[^\w.-]", "-", "-".join(parts))


def _variables(names: Sequence[str]) -> dict[str, str]:
    for name in names:
        if SECRET.search(name):
            raise ConfigError(
                f"--env {name} looks like a secret, and the dashboard would show it: "
                "set it in the environment of the cluster's nodes, or give them a role"
            )
        if name not in os.environ:
            raise ConfigError(f"--env {name}: that variable is not set here: export it, or leave it out")
    return {name: os.environ[name] for name in names}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cluster.submit", usage=USAGE, description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="CLUSTER", help="the dashboard's address, or a verb and a job")
    parser.add_argument("--id", help="the job's id; a second job of the same id is refused")
    parser.add_argument("--detach", action="store_true", help="do not follow the log")
    parser.add_argument("--env", action="append", default=[], metavar="NAME", help="pass this variable on; no secrets")
    parser.add_argument("--with", action="append", default=[], metavar="PATH", dest="extra", help="send this too")
    return parser


def main() -> int:
    own, command = sys.argv[1:], list[str]()
    if "--" in own:
        place = own.index("--")
        own, command = own[:place], own[place + 1 :]
    options = _parser().parse_args(own)
    clusters = [word for word in options.words if "://" in word]
    words = [word for word in options.words if "://" not in word]
    cluster = clusters[0] if clusters else None
    if len(clusters) > 1 or (command and words) or (words and words[0] not in VERBS):
        raise ConfigError(f"{(words or clusters)[-1]!r} is not understood: {USAGE}, or a verb of {', '.join(VERBS)}")
    logs.setup()
    if not words:
        if not command:
            raise ConfigError(f"no command given: {USAGE}")
        job = submit(command, cluster, options.id, options.env, options.extra)
        return _followed(job, cluster, options.detach)
    verb, *jobs = words
    if len(jobs) != (verb != "list"):
        raise ConfigError(f"{verb} takes {'no' if verb == 'list' else 'one'} job: python -m cluster.submit list")
    if verb == "list":
        print(listing(cluster))
    elif verb == "status":
        client = connect(cluster)
        print(asked(lambda: client.get_job_status(jobs[0]), jobs[0]).value)
    elif verb == "logs":
        follow(jobs[0], cluster)
    elif verb == "stop":
        client = connect(cluster)
        stopped = asked(lambda: client.stop_job(jobs[0]), jobs[0])
        print(f"job {jobs[0]} {'is being stopped' if stopped else 'has already ended'}")
    else:
        return _followed(resume(jobs[0], cluster), cluster, options.detach)
    return 0


def _followed(job: str, cluster: str | None, detach: bool) -> int:
    if detach:
        print(job)
    else:
        follow(job, cluster)
    return 0


if __name__ == "__main__":
    exit_with(main)
