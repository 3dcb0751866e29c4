"""The local S3 server and Ray nodes: they start, are closed to strangers, and leave nothing behind."""

import json
import os
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import ray

from cluster import local, processes
from cluster.local import RayCluster, S3Server
from common import storage
from common.errors import NotFoundError, RunError
from tests import entry


def _wait_until_alive(mark: str, count: int) -> None:
    for _ in range(200):
        if len(processes.alive(mark)) == count:
            return
        time.sleep(0.05)
    raise AssertionError(processes.alive(mark))


def test_end_reaches_what_left_the_process_group_and_lost_its_parent(tmp_path: Path) -> None:
    # The outer shell dies at once: its detached child has neither its group nor a living parent, as Ray's jobs do.
    script = "setsid sh -c 'exec sleep 600' & exec sh -c 'trap \"\" TERM; sleep 600 & wait; sleep 600'"
    stranger = subprocess.Popen(["sleep", "600"])
    processes.start(["sh", "-c", f"({script}) & sleep 0.3"], dict(os.environ), "mark-1", tmp_path / "log")
    processes.start(["sleep", "600"], dict(os.environ), "mark-10", tmp_path / "log")
    _wait_until_alive("mark-1", 3)
    processes.end("mark-1", grace_s=0.3)  # one of them ignores SIGTERM
    assert processes.alive("mark-1") == []
    (other,) = processes.alive("mark-10")
    assert stranger.poll() is None
    assert os.getsid(other) == other  # Ctrl-C in the terminal goes to the terminal's session
    processes.end("mark-10")
    stranger.kill()
    stranger.wait()


def test_a_child_that_dies_is_told_with_its_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = processes.start(["sh", "-c", "echo no space left; exit 3"], dict(os.environ), "mark-2", log)
    with pytest.raises(RunError, match=r"S3 server ended with code 3: no space left"):
        processes.wait_for(lambda: False, child, "S3 server", log, timeout_s=30)


def test_free_ports_skip_a_taken_one(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = processes.free_ports(3)
    assert len(set(taken)) == 3
    monkeypatch.setattr(processes, "_is_free", lambda port: port % 2 == 0)
    assert all(port % 2 == 0 for port in processes.free_ports(20))


def test_s3_credentials_are_private_and_a_missing_bucket_stays_missing(s3_server: S3Server, s3: str) -> None:
    assert s3_server.env["AWS_SECRET_ACCESS_KEY"] not in repr(s3_server)
    storage.publish_bytes(b"x", f"{s3}/a")
    with pytest.raises(NotFoundError, match="bucket"):
        storage.publish_bytes(b"x", "s3://no-such-bucket/a")


def test_s3_server_keeps_its_data_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for attempt in range(2):
        server = local.start_s3(tmp_path, ["kept"])
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        if attempt == 0:
            storage.publish_bytes(b"x", "s3://kept/a")
        assert storage.read("s3://kept/a") == b"x"
        server.stop()
        assert processes.alive(server.mark) == []
        assert not [p for p in Path("/tmp").glob("seaweedfs-*") for port in server.ports if str(port) in p.name]
    assert stat.S_IMODE((tmp_path / "s3.json").stat().st_mode) == 0o600


def test_a_child_does_not_outlive_its_parent_unless_detached(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from cluster import processes\n"
        "mark, log = sys.argv[1], Path(sys.argv[2])\n"
        "processes.start(['sleep', '600'], os.environ, mark + '-bound', log)\n"
        "processes.start(['sleep', '600'], os.environ, mark + '-detached', log, detached=True)\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, "mark-3", str(tmp_path / "log")], cwd=entry.REPOSITORY)
    _wait_until_alive("mark-3-bound", 0)
    assert len(processes.alive("mark-3-detached")) == 1
    processes.end("mark-3-detached")


def test_a_node_is_killed_even_if_a_process_of_it_has_just_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to fail where the one that had ended was an error: its raylet went on."""
    ended, raylet = subprocess.Popen(["true"]), subprocess.Popen(["sleep", "600"])
    ended.wait()
    monkeypatch.setattr(processes, "alive", lambda mark: [ended.pid])
    monkeypatch.setattr(processes, "parent", lambda pid: raylet.pid)
    monkeypatch.setattr(RayCluster, "_raylet", lambda cluster, place: raylet.pid)
    RayCluster("", "", {}, "no process's mark", "", "").kill_node(1)
    assert raylet.wait(10) == -9


@pytest.mark.slow
def test_up_and_down_by_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    up = entry.run("cluster.local", "up", f"folder={folder}", "nodes=3", "cpus_per_node=1")
    assert up.code == 0, up.err
    state = json.loads((folder / "state.json").read_text())
    try:
        assert stat.S_IMODE((folder / "state.json").stat().st_mode) == 0o600
        assert stat.S_IMODE((folder / "env.sh").stat().st_mode) == 0o600
        for value in (state["S3Server"]["env"]["AWS_SECRET_ACCESS_KEY"], (folder / "ray/ray_token").read_text()):
            assert value not in up.out + up.err
        entry.assert_refused(entry.run("cluster.local", "up", f"folder={folder}"), "down")
        check = (
            "import ray; from common import storage\n"
            "storage.publish_bytes(b'x', 's3://runs/a'); ray.init(logging_level='ERROR')\n"
            "import mlflow; found = mlflow.MlflowClient().search_experiments(filter_string=\"name = 'no'\")\n"
            "print(sum(node['Alive'] for node in ray.nodes()), ray.cluster_resources()['CPU'], len(found))"
        )
        command = f'source "{folder}/env.sh" && exec "{sys.executable}" -c "$0"'

        def used() -> list[bytes]:
            clean = _without("RAY_", "AWS_", "MLFLOW_TRACKING")
            done = subprocess.run(["bash", "-c", command, check], cwd=entry.REPOSITORY, env=clean, capture_output=True)
            assert done.returncode == 0, done.stderr
            return done.stdout.split()

        assert used() == [b"3", b"3.0", b"0"]
        drained = entry.run("cluster.local", "drain-node", "1", f"folder={folder}")
        assert drained.code == 0, drained.err
        killed = entry.run("cluster.local", "kill-node", "2", f"folder={folder}")
        assert killed.code == 0, killed.err
        entry.assert_refused(entry.run("cluster.local", "kill-node", "7", f"folder={folder}"), "no node 7", "1 to 2")
        deadline = time.monotonic() + 120
        while used()[0] != b"1":  # an idle node that is drained leaves by itself
            assert time.monotonic() < deadline, "the other nodes are still thought alive"
        added = entry.run("cluster.local", "add-node", f"folder={folder}")
        assert added.code == 0 and "node 3 is there" in added.out, added.err
        assert used() == [b"2", b"2.0", b"0"]
        killed = entry.run("cluster.local", "kill-node", "3", f"folder={folder}")
        assert killed.code == 0, killed.err
    finally:
        down = entry.run("cluster.local", "down", f"folder={folder}")
    assert down.code == 0, down.err
    assert not any(processes.alive(part["mark"]) for part in state.values())
    assert not Path(state["RayCluster"]["temp"]).exists()
    assert "ended 0 processes" in entry.run("cluster.local", "down", f"folder={folder}").out


def test_wrong_commands_are_refused(tmp_path: Path) -> None:
    entry.assert_refused(entry.run("cluster.local", "upp"), "upp")
    entry.assert_refused(entry.run("cluster.local", "kill-node", "one"), "number of a node")
    entry.assert_refused(entry.run("cluster.local", "kill-node", "1", f"folder={tmp_path}"), "no local cluster is up")
    entry.assert_refused(entry.run("cluster.local", "up", "node=2", f"folder={tmp_path}"), "node", "nodes")
    assert entry.run("cluster.local", "--help").code == 0
    without_ip = {"PATH": str(tmp_path)}
    up = entry.run("cluster.local", "up", "namespaces=true", f"folder={tmp_path}", env=without_ip)
    entry.assert_refused(up, "namespaces=true needs root and iproute2")


def _without(*prefixes: str) -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


def test_ray_wants_the_token(ray_local: RayCluster, tmp_path: Path) -> None:
    """The job server, and the ports between nodes: those listen on all interfaces."""
    token = Path(ray_local.env["RAY_AUTH_TOKEN_PATH"])
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{ray_local.dashboard_url}/api/jobs/", timeout=10)
    assert refused.value.code == 401
    processes.write_private(tmp_path / "token", "0" * 64)
    stranger = {**os.environ, "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    done = subprocess.run(
        [sys.executable, "-c", "import ray; ray.init()"], env=stranger, capture_output=True, text=True
    )
    assert done.returncode != 0 and "Authentication token is missing or incorrect" in done.stderr, done.stderr[-2000:]


def test_ray_workers_get_credentials_by_environment_and_one_thread(ray_local: RayCluster, s3: str) -> None:
    ray.init(ignore_reinit_error=True)

    @ray.remote
    def publish(url: str) -> str:
        storage.publish_bytes(b"from a worker", url)
        return os.environ["OMP_NUM_THREADS"]

    assert ray.get(publish.remote(f"{s3}/worker")) == "1"
    assert storage.read(f"{s3}/worker") == b"from a worker"
    assert ray.cluster_resources()["CPU"] == 4
