"""A real cluster on this machine: an S3 server, an MLflow server and Ray nodes, on free ports.

    python -m cluster.local up [key=value ...]               start it in the background; prints what to source
    python -m cluster.local kill-node N [folder=FOLDER]      end node N as a machine that loses power (0 is the head)
    python -m cluster.local add-node [folder=FOLDER]         start one more node, as a cluster does that replaces one
    python -m cluster.local drain-node N [folder=FOLDER]     give notice that node N is taken away, as spot markets do
    python -m cluster.local down [folder=FOLDER]             end exactly the processes that `up` started

Credentials and Ray's token are made for the run and lie in files that only their owner can read.
"""

import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from cluster import network, processes
from cluster.config import LocalConfig
from cluster.mlflow_server import MlflowServer, start_mlflow
from cluster.ray_nodes import LOCALHOST, RayCluster, start_ray
from cluster.s3_server import S3Server, start_s3
from common import config as configs
from common.errors import ConfigError, RunError, exit_with

USAGE = "python -m cluster.local up|down|add-node|kill-node N|drain-node N [key=value ...]"
Part = RayCluster | MlflowServer | S3Server


def up(config: LocalConfig) -> Path:
    """Start the S3 server and the Ray nodes; returns the file of variables to source.

    Raises:
        RunError: it is up already, or a part did not start.
    """
    folder = Path(config.folder).expanduser().absolute()
    if any(processes.alive(part.mark) for part in _parts(folder)):
        raise RunError(f"a local cluster is up in {folder}: end it with python -m cluster.local down folder={folder}")
    folder.mkdir(parents=True, exist_ok=True)
    started: list[Part] = []
    env: dict[str, str] = {}
    bridge = network.create() if config.namespaces else ""
    ip = network.host(bridge) if bridge else LOCALHOST
    try:
        if config.s3:
            started.append(start_s3(folder / "s3", config.buckets, True, ip))
            env.update(started[-1].env)
        if config.mlflow:
            started.append(start_mlflow(folder / "mlflow", True, ip))
            env.update(started[-1].env)
        started.append(start_ray(folder / "ray", config.nodes, config.cpus_per_node, env, True, bridge))
        env.update(started[-1].env)
        _write_state(folder, started)
        lines = [f"export {name}={shlex.quote(value)}\n" for name, value in env.items()]
        processes.write_private(folder / "env.sh", "".join(lines))
    except BaseException:
        for part in started:
            part.stop()
        network.remove(bridge)
        raise
    return folder / "env.sh"


def down(config: LocalConfig) -> int:
    """End what `up` started in this folder; returns how many processes that were. The S3 server's data stay."""
    folder = Path(config.folder).expanduser().absolute()
    count = 0
    for part in _parts(folder):
        count += len(processes.alive(part.mark))
        part.stop()
        if isinstance(part, RayCluster):
            network.remove(part.network)
    for name in ("state.json", "env.sh"):
        (folder / name).unlink(missing_ok=True)
    return count


def nodes(config: LocalConfig) -> RayCluster:
    """The Ray nodes that `up` started in this folder. Raises RunError if none are up."""
    for part in _parts(Path(config.folder).expanduser().absolute()):
        if isinstance(part, RayCluster):
            return part
    raise RunError(f"no local cluster is up in {config.folder}: python -m cluster.local up folder={config.folder}")


def add_node(config: LocalConfig) -> int:
    """Start one more Ray node; returns its place. Raises RunError."""
    cluster = nodes(config)
    place = cluster.add_node(detached=True)
    folder = Path(config.folder).expanduser().absolute()
    _write_state(folder, [cluster, *(part for part in _parts(folder) if not isinstance(part, RayCluster))])
    return place


def _write_state(folder: Path, parts: Sequence[Part]) -> None:
    state = {type(part).__name__: dataclasses.asdict(part) for part in parts}
    processes.write_private(folder / "state.json", json.dumps(state, indent=2))


def _parts(folder: Path) -> list[Part]:
    """What the state file names, Ray first: its jobs write to the servers."""
    path = folder / "state.json"
    if not path.exists():
        return []
    state = json.loads(path.read_text())
    kinds: list[type[Part]] = [RayCluster, MlflowServer, S3Server]
    return [kind(**state[kind.__name__]) for kind in kinds if kind.__name__ in state]


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or "--help" in arguments:
        print(f"{USAGE}\n\n{__doc__}\n{configs.describe(LocalConfig)}")
        return 0 if arguments else 2
    command, *rest = arguments
    place = None
    if command in ("kill-node", "drain-node"):
        if not rest or not rest[0].isdecimal():
            raise ConfigError(f"{command} takes the number of a node, 0 is the head: {USAGE}")
        place = int(rest.pop(0))
    config = configs.apply(LocalConfig(), configs.parse_overrides(rest))
    if command == "up":
        variables = up(config)
        servers = ["an S3 server"] * config.s3 + ["an MLflow server"] * config.mlflow
        print(f"up: {', '.join([f'{config.nodes} Ray nodes', *servers])}; to use them:")
        print(f"  source {shlex.quote(str(variables))}")
    elif command == "add-node":
        print(f"node {add_node(config)} is there")
    elif command == "kill-node" and place is not None:
        nodes(config).kill_node(place)
        print(f"killed node {place}")
    elif command == "drain-node" and place is not None:
        nodes(config).drain_node(place)
        print(f"node {place} is being drained")
    elif command == "down":
        print(f"ended {down(config)} processes of {config.folder}")
    else:
        raise ConfigError(f"unknown command {command!r}: {USAGE}")
    return 0


if __name__ == "__main__":
    exit_with(main)
