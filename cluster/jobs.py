"""The jobs of a Ray cluster: reach its job server, list them, follow one to its end."""

import asyncio
import logging
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

from common.errors import ConfigError, RunError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

T = TypeVar("T")
PATIENCE_S = 300.0  # without an answer of the job server, until its job is lost sight of

log = logging.getLogger(__name__)


def connect(cluster: str | None = None) -> "JobSubmissionClient":
    """The job server of a cluster. Raises ConfigError if none is named, RunError if it can't be used."""
    address = cluster or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not address:
        raise ConfigError(
            "no cluster is named and RAY_API_SERVER_ADDRESS is not set: give the dashboard's URL, http://HOST:8265"
        )
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise RunError(
            f"the cluster at {address} refused this client: {first_line(error.message)}; "
            "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        ) from None
    except (RuntimeError, OSError, ValueError) as error:
        raise RunError(f"no job server at {address}: {first_line(error)}") from None


def follow(job: str, cluster: str | None = None) -> None:
    """Print the job's log until it ends. Raises RunError unless it SUCCEEDED (also if somebody stopped it)."""
    client = connect(cluster)
    shown = 0

    async def tail() -> None:
        """Each connection sends the log from its beginning; print what is new."""
        nonlocal shown
        received = 0
        async for text in client.tail_job_logs(job):
            print(text[max(shown - received, 0) :], end="", flush=True)
            received += len(text)
            shown = max(shown, received)

    while not (status := asked(lambda: client.get_job_status(job), job)).is_terminal():
        try:
            asyncio.run(tail())
        except (RuntimeError, OSError) as error:
            log.warning("the log broke off: %s", first_line(error))
        time.sleep(1)
    asked(lambda: asyncio.run(tail()), job)
    if status != "SUCCEEDED":
        message = asked(lambda: client.get_job_info(job), job).message or "no reason given"
        raise RunError(f"job {job} {status.value}: {first_line(message)}")
    log.info("job %s SUCCEEDED", job)


def asked(question: Callable[[], T], job: str) -> T:
    """The job server's answer; asked again while there is none, for `PATIENCE_S`, then RunError, as for no such job."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return question()
        except (RuntimeError, OSError) as error:
            reason = first_line(error)
            if "status code 404" in str(error):  # not "404" alone: addresses and times hold that too
                raise RunError(f"there is no job {job}: see python -m cluster.submit list") from None
            if time.monotonic() > deadline:
                raise RunError(
                    f"lost sight of job {job} ({reason}); it may go on: python -m cluster.submit logs {job}"
                ) from None
            log.warning("no answer of the cluster (%s); asking again", reason)
            time.sleep(5)


def listing(cluster: str | None = None) -> str:
    """The cluster's jobs, newest first, a line each."""
    jobs = sorted(connect(cluster).list_jobs(), key=lambda job: job.start_time or 0, reverse=True)
    lines = []
    for job in jobs:
        start = datetime.fromtimestamp((job.start_time or 0) / 1000, UTC).strftime("%Y-%m-%d %H:%M")
        command = (job.metadata or {}).get("command", job.entrypoint)
        lines.append(f"{job.submission_id or job.job_id}  {job.status.value:9}  {start}  {command}")
    return "\n".join(lines) or "no jobs"


def first_line(text: object) -> str:
    return next(iter(str(text).strip().splitlines()), "")
