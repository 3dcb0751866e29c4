"""Child processes that end as a whole, whatever they started themselves.

Ray's jobs, actors and their children leave their parent's process group and outlive it, so neither a group nor the
process tree finds all of them. The environment does: each child starts with a random mark that all of its descendants
inherit. A process is signalled by pid, through a handle taken before its mark is read, so never another one.
"""

import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from common.errors import RunError

MARK = "LOCAL_CLUSTER_MARK"
GRPC_OFFSET = 10_000  # SeaweedFS adds it to an HTTP port
PR_SET_PDEATHSIG = 1  # prctl(2)

_libc = ctypes.CDLL(None)
_children: dict[str, list[subprocess.Popen[bytes]]] = {}  # by mark, to be reaped by `end`


def start(
    argv: Sequence[str], env: Mapping[str, str], mark: str, log: Path, detached: bool = False
) -> subprocess.Popen[bytes]:
    """Start `argv` in the folder of `log`, its output appended there; Ctrl-C in the terminal does not reach it.

    Unless `detached`, it gets SIGTERM should this process (the thread that calls) die without ending it.
    """
    # Ray renames its processes; SPT_NOENV keeps that from overwriting the environment that is read below.
    marked_env = {**env, MARK: mark, "SPT_NOENV": "1"}
    with open(log, "ab") as out:
        child = subprocess.Popen(
            argv,
            cwd=log.parent,
            env=marked_env,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=None if detached else lambda: _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM),
        )
    _children.setdefault(mark, []).append(child)
    return child


def alive(mark: str) -> list[int]:
    """Pids of the running processes that carry `mark`."""
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and _has(entry, mark)]


def command(pid: int) -> list[str]:
    """The words of a process's command; none once it has ended."""
    try:
        return os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")[:-1]
    except OSError:
        return []


def environment(pid: int) -> dict[str, str]:
    """The variables a process was started with. Raises OSError once it has ended."""
    found = os.fsdecode(Path(f"/proc/{pid}/environ").read_bytes()).split("\0")
    return dict(variable.split("=", 1) for variable in found if "=" in variable)


def parent(pid: int) -> int:
    """The pid of a process's parent; 0 once it has ended."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def end(mark: str, grace_s: float = 0.0) -> None:
    """End every process that carries `mark`: SIGTERM, then after `grace_s` SIGKILL, until none is left.

    Raises:
        RunError: some could not be ended.
    """
    if grace_s:
        _signal(mark, signal.SIGTERM)
        deadline = time.monotonic() + grace_s
        while alive(mark) and time.monotonic() < deadline:
            time.sleep(0.1)
    for _ in range(50):  # a process may be starting another one just now
        _signal(mark, signal.SIGKILL)
        if not alive(mark):
            for child in _children.pop(mark, []):
                child.wait()
            return
        time.sleep(0.1)
    raise RunError(f"processes {alive(mark)} could not be ended: look at them with ps")


def wait_for(ready: Callable[[], bool], child: subprocess.Popen[bytes], what: str, log: Path, timeout_s: float) -> None:
    """Return once `ready()` is true. Raises RunError with the end of `log` if `child` ends or time is up."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        code = child.poll()
        if code is not None or time.monotonic() > deadline:
            why = f"ended with code {code}" if code is not None else f"was not ready after {timeout_s:.0f} s"
            tail = " | ".join(log.read_text(errors="replace").splitlines()[-3:])
            raise RunError(f"{what} {why}: {tail} (whole log: {log})")
        time.sleep(0.2)


def free_ports(count: int) -> list[int]:
    """`count` ports that nobody listens on, each with its port + 10000 free too.

    They lie above Ray's worker ports (10002-19999) and below those the kernel hands out (from 32768), so none is taken
    by a passing connection. Random, so that two programs that look at the same time rarely choose the same.
    """
    candidates = random.SystemRandom().sample(range(20_000, 30_000), 500)
    ports: list[int] = []
    for port in candidates:
        if len(ports) == count:
            break
        if _is_free(port) and _is_free(port + GRPC_OFFSET):
            ports.append(port)
    assert len(ports) == count, "hardly any free port on this machine"
    return ports


def path() -> str:
    """PATH with this interpreter's folder first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, from its first byte on."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _signal(mark: str, number: int) -> None:
    for pid in alive(mark):
        try:
            handle = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            # Read the mark again: the handle now names one process, even if the pid has been given to another.
            if _has(Path(f"/proc/{pid}"), mark):
                signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            pass
        finally:
            os.close(handle)


def _has(proc: Path, mark: str) -> bool:
    try:
        # A zombie's environment is empty: it counts as ended.
        return f"{MARK}={mark}".encode() in (proc / "environ").read_bytes().split(b"\0")
    except OSError:  # ended meanwhile, or another user's
        return False


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True
