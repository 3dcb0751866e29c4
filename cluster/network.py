"""A network inside this machine: Ray nodes with an IP address each, as on machines apart. Linux with iproute2, as root.

A bridge, and for each node a network namespace whose one interface is a port of that bridge. It leads nowhere else.
"""

import secrets
import subprocess
from pathlib import Path

from common.errors import RunError

INTERFACE = "eth0"  # of a node, in its own namespace


def create() -> str:
    """Make the bridge; returns the network's name. Raises RunError where that is not permitted."""
    name = f"ray{secrets.randbelow(256)}-{secrets.randbelow(256)}"
    _ip("link", "add", name, "type", "bridge")
    _ip("address", "add", f"{host(name)}/24", "dev", name)
    _ip("link", "set", name, "up")
    return name


def host(name: str) -> str:
    """The address of this machine in the network."""
    return f"10.{name.removeprefix('ray').replace('-', '.')}.1"


def add(name: str, place: int) -> str:
    """Make the namespace of a node, unless it is there; returns its address. Raises RunError."""
    namespace, port = f"{name}-{place}", f"{name}v{place}"
    address = f"{host(name)[:-1]}{place + 2}"
    if Path("/run/netns", namespace).exists():
        return address
    _ip("netns", "add", namespace)
    _ip("link", "add", port, "type", "veth", "peer", "name", INTERFACE, "netns", namespace)
    _ip("link", "set", port, "master", name, "up")
    _ip("-n", namespace, "address", "add", f"{address}/24", "dev", INTERFACE)
    for interface in (INTERFACE, "lo"):
        _ip("-n", namespace, "link", "set", interface, "up")
    return address


def inside(name: str, place: int) -> list[str]:
    """What to put before a command that shall run in the namespace of a node; it becomes that command."""
    return ["nsenter", f"--net=/run/netns/{name}-{place}", "--"]  # `ip netns exec` would hide /sys/fs/cgroup


def remove(name: str) -> None:
    """Take the network away, once its processes have ended; nothing happens if there is none."""
    if not name:
        return
    for namespace in Path("/run/netns").glob(f"{name}-*"):
        _ip("netns", "delete", namespace.name)
    if Path("/sys/class/net", name).exists():
        _ip("link", "delete", name)


def _ip(*words: str) -> None:
    try:
        subprocess.run(["ip", *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
        raise RunError(
            f"no network of its own for each node (ip {' '.join(words[:2])}: {reason}): namespaces=true needs root and "
            "iproute2; leave it out"
        ) from None
