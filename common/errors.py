"""The errors a person is meant to read: one sentence with the key, the value and the way out.

Each class takes exactly one message, so an error survives pickling between Ray processes. Everything
else that is raised is a defect of the program and keeps its traceback.
"""

import sys
from collections.abc import Callable
from typing import NoReturn

from common.logs import new_line


class ProjectError(Exception):
    """A user's mistake or a fault outside the program, told in one sentence."""


class ConfigError(ProjectError):
    """A key or value of a configuration is wrong."""


class StorageError(ProjectError):
    """Reading or writing a URL failed."""


class NoSpaceError(StorageError):
    """The disk that the URL lies on is full."""


class NotFoundError(StorageError):
    """The URL names no object."""


class NoBucketError(NotFoundError):
    """The URL's bucket does not exist."""


class AlreadyExistsError(StorageError):
    """A conditional publish found an object in its place."""


class DataError(ProjectError):
    """The content of a file is not what it should be."""


class RunError(ProjectError):
    """A run, build or study cannot start or could not finish."""


class TryAgainError(RunError):
    """A run could not go on now; the same command again may."""


def told(error: BaseException, _seen: frozenset[int] = frozenset()) -> ProjectError | None:
    """The ProjectError at the root of `error`, if there is one.

    Ray wraps what a task raised (`RayTaskError.cause`), and Ray Train what a worker raised
    (`WorkerGroupError.worker_failures`, a dict by rank) or its controller (`ControllerError.controller_failure`); the
    first one found is returned.
    """
    inner: list[object] = [getattr(error, name, None) for name in ("cause", "controller_failure", "__cause__")]
    failures = getattr(error, "worker_failures", None)
    if isinstance(failures, dict):
        inner.extend(failures.values())
    seen = _seen | {id(error)}  # causes may go round in a circle
    for candidate in inner:
        if isinstance(candidate, BaseException) and id(candidate) not in seen:
            found = told(candidate, seen)
            if found is not None:
                return found
    return error if isinstance(error, ProjectError) else None


def exit_with(main: Callable[[], int | None]) -> NoReturn:
    """Run an entry point; a ProjectError becomes one line on stderr and exit code 1.

    The exit code matters: `ray job submit` calls a job that printed an error and exited 0 SUCCEEDED.
    """
    try:
        code = main()
    except KeyboardInterrupt:
        print(f"{new_line()}interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        known = told(error)
        if known is None:
            raise
        print(f"{new_line()}error: {known}", file=sys.stderr)
        sys.exit(1)
    sys.exit(code or 0)
