"""An MLflow server with its data in a folder, on a free port of this machine. It asks for no password: it is only for
whoever is logged in here."""

import os
import secrets
import sys
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

from cluster import processes

START_TIMEOUT_S = 180.0


@dataclass(frozen=True)
class MlflowServer:
    """A running MLflow server. `env` holds its address."""

    url: str
    env: dict[str, str] = field(repr=False)
    mark: str

    def stop(self) -> None:
        processes.end(self.mark, grace_s=5)


def start_mlflow(folder: Path, detached: bool = False, ip: str = "127.0.0.1") -> MlflowServer:
    """Start MLflow with sqlite and artifacts in `folder`; returns once it answers. Raises RunError if it does not."""
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    (port,) = processes.free_ports(1)
    argv = [
        *(sys.executable, "-m", "mlflow", "server", "--host", ip, "--port", str(port), "--workers", "1"),
        *("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder / "files")),
    ]
    url = f"http://{ip}:{port}"
    server = MlflowServer(url, {"MLFLOW_TRACKING_URI": url}, secrets.token_hex(16))
    # Its jobs are for the judging of language models: seven more processes, 1.6 GB in all.
    env = {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    try:
        child = processes.start(argv, env, server.mark, folder / "mlflow.log", detached)
        processes.wait_for(
            lambda: _answers(f"{url}/health"), child, "MLflow server", folder / "mlflow.log", START_TIMEOUT_S
        )
    except BaseException:
        server.stop()
        raise
    return server


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
