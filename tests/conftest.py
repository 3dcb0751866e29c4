"""Real parts for all tests: one S3 server and one Ray cluster for the session, both started on first use."""

import atexit
import os
import secrets
import shutil
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from cluster.local import RayCluster, S3Server, start_ray, start_s3
from cluster.processes import write_private

REPOSITORY = Path(__file__).parents[1]
hypothesis.settings.register_profile("no timing", deadline=None)
hypothesis.settings.load_profile("no timing")

# Ray reads its authentication mode once, when it is imported, and that is before any fixture runs. So mode and token
# are set here: for `ray_local`, and for a test that starts a Ray of its own, which would else write a token under the
# home folder.
RAY_FOLDER = Path(tempfile.mkdtemp(prefix="tests-ray-"))
atexit.register(shutil.rmtree, RAY_FOLDER, ignore_errors=True)
write_private(RAY_FOLDER / "ray_token", secrets.token_hex(32))
os.environ.update(
    RAY_AUTH_MODE="token",
    RAY_AUTH_TOKEN_PATH=str(RAY_FOLDER / "ray_token"),
    RAY_USAGE_STATS_ENABLED="0",
    MLFLOW_DISABLE_TELEMETRY="true",
)


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server with the bucket `tests`; AWS_* of this process point to it."""
    server = start_s3(tmp_path_factory.mktemp("s3"), ["tests"])
    with pytest.MonkeyPatch.context() as patch:
        # What a developer's shell may hold would win over the variables below.
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION"):
            patch.delenv(name, raising=False)
        for name, value in server.env.items():
            patch.setenv(name, value)
        yield server
    server.stop()


@pytest.fixture
def s3(s3_server: S3Server) -> str:
    """An empty place on the S3 server, of this test alone."""
    return f"s3://tests/{uuid.uuid4().hex[:12]}"


@pytest.fixture(scope="session")
def ray_local(s3_server: S3Server) -> Iterator[RayCluster]:
    """One Ray node of 4 logical CPUs with dashboard, job server and token; RAY_* of this process point to it.

    It does not connect this process: a test that is a driver calls `ray.init(ignore_reinit_error=True)`.
    """
    # Metrics at a pace for tests.
    env = {**s3_server.env, "RAY_metrics_report_interval_ms": "1000"}
    cluster = start_ray(RAY_FOLDER, num_nodes=1, cpus_per_node=4, env=env)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in cluster.env.items():
            patch.setenv(name, value)
        yield cluster
        if "ray" in sys.modules:
            sys.modules["ray"].shutdown()
    cluster.stop()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout: annotations, real clips, golden files."""
    path = REPOSITORY.parent / "shared"
    if not path.is_dir():
        pytest.skip("needs the folder 'shared' beside the checkout (annotations, clips, golden files): not there")
    return path
