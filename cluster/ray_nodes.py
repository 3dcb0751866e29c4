"""Ray nodes on this machine, with dashboard, job server and token authentication."""

import json
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from cluster import network, processes
from cluster.spot_notice import drain
from common.errors import RunError

T = TypeVar("T")
log = logging.getLogger(__name__)

LOCALHOST = "127.0.0.1"
START_TIMEOUT_S = 300.0
# Ray gives a node's agent 15 s to start, a constant in its code; on a busy machine that is too short now and then.
ATTEMPTS = 3
OBJECT_STORE_BYTES = 300_000_000


@dataclass(frozen=True)
class RayCluster:
    """Running Ray nodes. `env` are the variables that ray.init, `ray job submit` and the State API need."""

    address: str
    dashboard_url: str
    env: dict[str, str] = field(repr=False)
    mark: str
    temp: str
    folder: str  # for logs
    network: str = ""  # "": all nodes are at this machine's address
    nodes: list[str] = field(default_factory=list)  # ids, the head first

    def alive(self) -> list[str]:
        """Ids of the nodes that the cluster thinks alive."""
        return _alive_nodes(self.dashboard_url, Path(self.env["RAY_AUTH_TOKEN_PATH"]))

    def kill_node(self, place: int) -> None:
        """End a node as a machine does that loses power: SIGKILL to its raylet and all that this runs.

        Raises:
            RunError: there is no such node, or no longer.
        """
        raylet = self._raylet(place)
        children = [pid for pid in processes.alive(self.mark) if processes.parent(pid) == raylet]
        for pid in (*children, raylet):
            with suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(pid, signal.SIGKILL)

    def add_node(self, detached: bool = False) -> int:
        """Start one more node, like the others; returns its place. Raises RunError."""
        start = processes.parent(self._raylet(0))
        cpus = next(word for word in processes.command(start) if word.startswith("--num-cpus="))
        env = processes.environment(start)  # of the head: storage's credentials need not lie in a file for this
        options = [f"--address={self.address}", "--num-gpus=0", cpus]
        return _patiently(lambda: self._start_node(options, env, detached))

    def _start_node(self, options: Sequence[str], env: Mapping[str, str], detached: bool) -> int:
        """`ray start` with these options; returns the node's place once the cluster has it. Raises RunError."""
        place = len(self.nodes)
        output = Path(self.folder) / f"ray-{place}.log"
        address = network.add(self.network, place) if self.network else LOCALHOST
        argv = _ray_start([*options, f"--temp-dir={Path(self.temp) / str(place)}"], address)
        if self.network:
            argv = [*network.inside(self.network, place), *argv]
        child = processes.start(argv, env, self.mark, output, detached)

        def new() -> set[str]:
            return set(self.alive()) - set(self.nodes)

        processes.wait_for(lambda: bool(new()), child, f"Ray node {place}", output, START_TIMEOUT_S)
        self.nodes.extend(new())
        return place

    def drain_node(self, place: int, deadline_s: int = 110) -> None:
        """Tell the cluster that a node is taken away in `deadline_s`, as a spot notice does. Raises RunError."""
        self._raylet(place)
        drain(self.nodes[place], deadline_s, self.env)

    def _raylet(self, place: int) -> int:
        for pid in processes.alive(self.mark):
            words = processes.command(pid)
            if words[:1] and words[0].endswith("raylet/raylet") and any(f"{self.temp}/{place}/" in w for w in words):
                return pid
        last = len(self.nodes) - 1
        raise RunError(f"there is no node {place} that is alive: the head is 0, the others are 1 to {last}")

    def stop(self) -> None:
        # At once: a throw-away cluster has nothing to save, and Ray's own way out takes ten seconds.
        processes.end(self.mark)
        shutil.rmtree(self.temp, ignore_errors=True)


def start_ray(
    folder: Path,
    num_nodes: int = 1,
    cpus_per_node: int = 2,
    env: Mapping[str, str] | None = None,
    detached: bool = False,
    network_name: str = "",
) -> RayCluster:
    """Start a head and `num_nodes - 1` more Ray nodes with token authentication; returns once all are alive.

    Args:
        folder: for logs and the token; a token that is there already stays.
        cpus_per_node: logical CPUs of each node. GPUs, if there are any, belong to the head.
        env: variables for all processes of the nodes, jobs included (this is how AWS_* reach a job).
        detached: it outlives this process.
        network_name: of `cluster.network`, where each node has an address of its own; "" = all have this machine's.

    Raises:
        RunError: a node did not start.
    """
    arguments = (folder.absolute(), num_nodes, cpus_per_node, env or {}, detached, network_name)
    return _patiently(lambda: _start_ray(*arguments))


def _patiently(start: Callable[[], T]) -> T:
    for _ in range(ATTEMPTS - 1):
        try:
            return start()
        except RunError as error:
            log.warning("%s; starting Ray once more", error)
    return start()


def _start_ray(
    folder: Path, num_nodes: int, cpus_per_node: int, env: Mapping[str, str], detached: bool, network_name: str
) -> RayCluster:
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / "ray_token"
    if not token.exists():
        processes.write_private(token, secrets.token_hex(32))
    gcs, dashboard, client = processes.free_ports(3)
    ip = network.add(network_name, 0) if network_name else LOCALHOST
    address, dashboard_url = f"{ip}:{gcs}", f"http://{ip}:{dashboard}"
    temp = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets below it: a path has at most 107 bytes
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    node_env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        **env,
        **auth,
        # Train's PlacementGroupCleaner asks the State API from inside the cluster: on a machine with two of them it
        # would not know which is meant, and a dead run's CPUs would never be free again.
        "RAY_ADDRESS": address,
        "TMPDIR": str(temp),  # what killed processes leave behind goes with it
        "PATH": processes.path(),  # a job's `python` is the one that the node finds
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if network_name:  # gloo and NCCL would take what the host's name stands for, which is 127.0.0.1
        node_env |= {"GLOO_SOCKET_IFNAME": network.INTERFACE, "NCCL_SOCKET_IFNAME": network.INTERFACE}
    head = ["--head", f"--port={gcs}", f"--dashboard-host={ip}", f"--dashboard-port={dashboard}"]
    head.append(f"--ray-client-server-port={client}")
    variables = {**auth, "RAY_ADDRESS": address, "RAY_API_SERVER_ADDRESS": dashboard_url}
    cluster = RayCluster(address, dashboard_url, variables, secrets.token_hex(16), str(temp), str(folder), network_name)
    try:
        for number in range(num_nodes):
            options = head if number == 0 else [f"--address={address}", "--num-gpus=0"]
            cluster._start_node([*options, f"--num-cpus={cpus_per_node}"], node_env, detached)
    except BaseException:
        cluster.stop()
        raise
    return cluster


def _ray_start(options: Sequence[str], address: str) -> list[str]:
    agent, agent_grpc, runtime_env, metrics = processes.free_ports(4)
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options),
        *(f"--node-ip-address={address}", "--min-worker-port=0", "--max-worker-port=0"),  # 0: the kernel's choice
        *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"),
        *(f"--runtime-env-agent-port={runtime_env}", f"--metrics-export-port={metrics}"),
        *(f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats", "--log-color=false"),
    ]


def _alive_nodes(dashboard_url: str, token: Path) -> list[str]:
    request = urllib.request.Request(f"{dashboard_url}/nodes?view=summary")
    request.add_header("Authorization", f"Bearer {token.read_text()}")
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            nodes = json.load(answer)["data"]["summary"]
    except (OSError, ValueError):
        return []
    return [node["raylet"]["nodeId"] for node in nodes if node["raylet"].get("state") == "ALIVE"]
