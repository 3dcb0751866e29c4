"""Whatever is killed during a build, the same bytes are there in the end and only unfinished shards are built again."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import RayCluster, S3Server, start_ray, start_s3
from common import storage
from datasets_prep.verify import verify
from tests.conftest import RAY_FOLDER, REPOSITORY
from tests.datasets_prep.conftest import ffmpeg, picture
from tests.faults import answers, kill, kill_node, start_storage, stop_storage, wait_until

pytestmark = pytest.mark.slow
SHARDS = 14


@pytest.fixture(scope="module")
def s3_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A server that tests may kill; AWS_* point to it."""
    server = start_s3(tmp_path_factory.mktemp("s3"), ["faults"])
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        yield server
    server.stop()


@pytest.fixture(scope="module")
def nodes(s3_alone: S3Server) -> Iterator[RayCluster]:
    cluster = start_ray(RAY_FOLDER / "three", num_nodes=3, cpus_per_node=1, env=s3_alone.env)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """28 clips in 14 shards, some ten seconds of work, and one clip that is rejected."""
    folder = tmp_path_factory.mktemp("long")
    ffmpeg(*picture("640x360", 30, 3), "-pix_fmt", "yuv420p", str(folder / "0.mp4"))
    (folder / "1.mp4").touch()
    for i in range(2, 2 * SHARDS):
        os.link(folder / "0.mp4", folder / f"{i}.mp4")
    lines = ["video,caption,split", *(f"{i}.mp4,a clip,train" for i in range(2 * SHARDS))]
    (folder / "annotations.csv").write_text("\n".join(lines))
    source = [f"source.annotations={folder}/annotations.csv", f"source.videos={folder}"]
    return ["custom", *source, "shards.max_samples=2", "video.short_side=180", "video.preset=medium"]


def start(nodes: RayCluster, arguments: list[str], output: str, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "datasets_prep.build", *arguments, f"output={output}"]
    with open(log, "ab") as file:
        return subprocess.Popen(command, env={**os.environ, **nodes.env}, cwd=REPOSITORY, stdout=file, stderr=file)


def finish(driver: subprocess.Popen[bytes], log: Path) -> str:
    assert driver.wait(400) == 0, log.read_text()
    return log.read_text()


def objects(output: str) -> dict[str, bytes]:
    return {e.url.removeprefix(output + "/"): storage.read(e.url) for e in storage.list_files(output)}


@pytest.fixture(scope="module")
def undisturbed(nodes: RayCluster, arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    log = tmp_path_factory.mktemp("undisturbed") / "log"
    finish(start(nodes, arguments, "s3://faults/undisturbed", log), log)
    assert verify("s3://faults/undisturbed") == 2 * SHARDS - 1
    return objects("s3://faults/undisturbed")


def wait_for_markers(output: str, count: int) -> dict[str, bytes]:
    def markers() -> list[str]:
        return [e.url for e in storage.list_files(output) if "/shard-" in e.url and e.url.endswith(".json")]

    wait_until(lambda: len(markers()) >= count)
    return objects(output)


def test_a_killed_worker(
    nodes: RayCluster, arguments: list[str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    output = "s3://faults/worker"
    driver = start(nodes, arguments, output, tmp_path / "log")
    wait_for_markers(output, 3)
    kill(nodes.mark, "ray::write_shard")
    assert "again in 5 s" in finish(driver, tmp_path / "log")
    assert objects(output) == undisturbed


def test_a_killed_driver(
    nodes: RayCluster, arguments: list[str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    output = "s3://faults/driver"
    driver = start(nodes, arguments, output, tmp_path / "log")
    before = wait_for_markers(output, 3)
    driver.kill()
    driver.wait()
    assert "dataset.json" not in before
    there = {e.url for e in storage.list_files(output)}
    log = finish(start(nodes, arguments, output, tmp_path / "log"), tmp_path / "log")
    assert f"of {SHARDS} shards are there already" in log
    assert objects(output) == undisturbed and len(there) < len(undisturbed)


def test_two_drivers_at_once(
    nodes: RayCluster, arguments: list[str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    output = "s3://faults/two"
    drivers = [start(nodes, arguments, output, tmp_path / name) for name in ("a", "b")]
    for driver, name in zip(drivers, ("a", "b"), strict=True):
        finish(driver, tmp_path / name)
    assert objects(output) == undisturbed


def test_storage_that_is_down_for_a_minute(
    nodes: RayCluster, s3_alone: S3Server, arguments: list[str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    output = "s3://faults/storage"
    driver = start(nodes, arguments, output, tmp_path / "log")
    wait_for_markers(output, 3)
    argv = stop_storage(s3_alone)
    time.sleep(60)
    assert driver.poll() is None, (tmp_path / "log").read_text()
    start_storage(s3_alone, argv)
    assert "again in" in finish(driver, tmp_path / "log")
    assert objects(output) == undisturbed


def test_storage_that_is_down_when_a_build_begins(
    nodes: RayCluster, s3_alone: S3Server, arguments: list[str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    """The driver says so and ends; nothing that it left is in the way of the next."""
    output = "s3://faults/begin"
    argv = stop_storage(s3_alone)
    assert start(nodes, arguments, output, tmp_path / "log").wait(200) == 1
    *_, told = (tmp_path / "log").read_text().splitlines()
    assert told.startswith("error: cannot write bucket 'faults'") and "Traceback" not in told
    start_storage(s3_alone, argv)
    wait_until(lambda: answers("s3://faults/undisturbed"))
    finish(start(nodes, arguments, output, tmp_path / "log"), tmp_path / "log")
    assert objects(output) == undisturbed


def test_a_killed_node(nodes: RayCluster, arguments: list[str], undisturbed: dict[str, bytes], tmp_path: Path) -> None:
    output = "s3://faults/node"
    driver = start(nodes, arguments, output, tmp_path / "log")
    wait_for_markers(output, 3)
    kill_node(nodes, "ray::write_shard")
    assert "again in" in finish(driver, tmp_path / "log")
    assert objects(output) == undisturbed


def test_tasks_lie_on_all_nodes(tmp_path: Path) -> None:
    """Each node has room for them all, so Ray's default would fill the first. Seen to fail without SPREAD."""
    cluster = start_ray(RAY_FOLDER / "wide", num_nodes=3, cpus_per_node=8)
    program = (
        "import ray, time\n"
        "from datasets_prep import tasks\n"
        "def node():\n"
        "    time.sleep(2)\n"
        "    return ray.get_runtime_context().get_node_id()\n"
        "print('nodes:', len(set(tasks.run(node, list('abc'), lambda _: (), workers=3))))\n"
    )
    try:
        command = [sys.executable, "-c", program]
        done = subprocess.run(
            command, env={**os.environ, **cluster.env}, cwd=REPOSITORY, capture_output=True, text=True
        )
    finally:
        cluster.stop()
    assert "nodes: 3" in done.stdout, done.stderr
