"""The four jobs by cluster.submit on a local cluster of three nodes, each of which loses a node: all SUCCEED.

The nodes are in network namespaces, with an IP address each, where this machine permits that.
The jobs use secrets that were planted in the environment of the nodes and servers. Afterwards nothing that a stranger
may look at holds one.
"""

import base64
import json
import os
import re
import secrets
import shlex
import stat
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest

from cluster import local, network, processes
from cluster.config import LocalConfig
from common import shards, storage
from common.errors import RunError
from tests.conftest import REPOSITORY
from tests.faults import kill_node, wait_until

pytestmark = pytest.mark.slow
DATASET, RUN, VECTORS, STUDY = "s3://datasets/shapes", "s3://runs/first", "s3://runs/vectors", "s3://runs/studies/tiny"
SHARDS, STEPS = 12, 80
PATIENCE_S = 400  # with one step of a job, on a busy machine
PRIVATE = ("state.json", "env.sh", "ray/ray_token", "s3/s3.json")  # where `cluster.local` keeps what it made
PACE = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"  # Ray's own poll at a pace for tests


def can_have_namespaces() -> bool:
    try:
        network.remove(network.create())
    except RunError:
        return False
    return True


class Site:
    """A local cluster, and the jobs that are run on it."""

    def __init__(self, folder: Path, planted: dict[str, str]) -> None:
        self.folder = folder
        self.config = LocalConfig(folder=str(folder), nodes=3, cpus_per_node=1, namespaces=can_have_namespaces())
        variables = local.up(self.config).read_text()
        self.env = dict(word.split("=", 1) for word in shlex.split(variables) if "=" in word)
        self.planted = {**planted, "AWS_SECRET_ACCESS_KEY": self.env["AWS_SECRET_ACCESS_KEY"]}
        self.planted["the token"] = Path(self.env["RAY_AUTH_TOKEN_PATH"]).read_text()
        self.commands: list[str] = []  # of all processes, as seen whenever a node was killed

    def submit(self, name: str, *command: str, task: str, when: Callable[[], object]) -> str:
        """Run a command as a job; kill a node that runs `task` once `when()`, and replace it. The job's log."""
        path = self.folder / f"{name}.log"
        words = [sys.executable, "-m", "cluster.submit", "--env", PACE, "--", "python", "-m", *command]
        with open(path, "wb") as log:
            env = {**os.environ, **self.env, PACE: "0.5"}
            client = subprocess.Popen(words, env=env, cwd=REPOSITORY, stdout=log, stderr=log)
        wait_until(lambda: when() or client.poll() is not None, PATIENCE_S)
        nodes = local.nodes(self.config)
        self.see_commands()
        kill_node(nodes, task)
        assert client.poll() is None, f"the job ended before its node did: {path.read_text()[-3000:]}"
        assert client.wait(PATIENCE_S) == 0, path.read_text()[-5000:]
        local.add_node(self.config)
        text = path.read_text()
        assert text.rstrip().endswith("SUCCEEDED"), text[-3000:]
        return text

    def ask(self, path: str) -> bytes:
        """What the dashboard answers to who has the token."""
        request = urllib.request.Request(f"{self.env['RAY_API_SERVER_ADDRESS']}/{path}")
        request.add_header("Authorization", f"Bearer {self.planted['the token']}")
        with urllib.request.urlopen(request, timeout=60) as answer:
            return bytes(answer.read())

    def see_commands(self) -> None:
        marks = [part["mark"] for part in json.loads((self.folder / "state.json").read_text()).values()]
        self.commands += [" ".join(processes.command(pid)) for mark in marks for pid in processes.alive(mark)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    planted = {"MLFLOW_TRACKING_PASSWORD": secrets.token_hex(20), "HF_TOKEN": secrets.token_hex(20)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**planted, "MLFLOW_TRACKING_USERNAME": "somebody"}.items():
            patch.setenv(name, value)
        folder = tmp_path_factory.mktemp("site")
        try:
            site = Site(folder, planted)
            for name, value in site.env.items():
                if name.startswith("AWS_"):
                    patch.setenv(name, value)
            yield site
        finally:
            local.down(LocalConfig(folder=str(folder)))


@pytest.fixture(scope="module")
def dataset(site: Site) -> str:
    videos = f"source.videos={site.folder / 'videos'}"
    settings = ("source.num_pairs=24", "source.val_pairs=4", "source.test_pairs=4", "shards.max_samples=4")
    command = ("datasets_prep.build", "tiny", f"output={DATASET}", videos, *settings)
    text = site.submit("prep", *command, task="ray::write_shard", when=lambda: has(DATASET, "/shard-"))
    assert "again in 5 s" in text
    return DATASET


@pytest.fixture(scope="module")
def run(site: Site, dataset: str) -> str:
    settings = {
        "run.name": "first",
        "run.storage": "s3://runs",
        "data.dataset": dataset,
        "data.cache": site.folder / "cache",
        "tracking.uri": site.env["MLFLOW_TRACKING_URI"],
        "optim.steps": STEPS,
        "eval.every": STEPS,
        "checkpoint.every": 20,
        "workers.loader_workers": 0,
        "workers.timeout_s": 60,
        "workers.start_timeout_s": 60,
    }
    command = ("training.train", "tiny", *(f"{key}={value}" for key, value in settings.items()))
    text = site.submit("training", *command, task="ray::RayTrainWorker", when=lambda: has(RUN, "/state.pt", 2))
    assert re.search(r"going on at step [1-9]\d*; \d+ steps done after it are lost", text)
    return RUN


def has(url: str, name: str, count: int = 1) -> bool:
    return len([entry for entry in storage.list_files(url) if name in entry.url]) >= count


def test_preparation_loses_a_node(dataset: str) -> None:
    index, _ = shards.read_dataset(dataset)
    assert {name: split.samples for name, split in index.splits.items()} == {"train": 48, "val": 8, "test": 8}
    assert len(index.splits["train"].shards) == SHARDS


def test_training_loses_a_node(site: Site, run: str) -> None:
    assert 0 <= json.loads(storage.read(f"{run}/result.json"))["r1"] <= 100
    client = mlflow.MlflowClient(site.env["MLFLOW_TRACKING_URI"])
    tracked = client.get_run(json.loads(storage.read(f"{run}/mlflow_run.json"))["run_id"])
    assert tracked.info.status == "FINISHED"
    losses = client.get_metric_history(tracked.info.run_id, "train/loss")
    assert sorted(metric.step for metric in losses) == list(range(1, STEPS + 1))


def test_a_study_loses_a_node(site: Site, dataset: str) -> None:
    settings = (
        "storage=s3://runs/studies",
        f"tracking.uri={site.env['MLFLOW_TRACKING_URI']}",
        f"overrides.data.dataset={dataset}",
        f"overrides.data.cache={site.folder / 'cache'}",
        "overrides.workers.num_workers=1",
        "overrides.workers.loader_workers=0",
        "overrides.optim.steps=10",
        "overrides.eval.every=5",
        "trials=2",
    )
    command = ("tuning.study", "tiny", *settings)
    site.submit("study", *command, task="ray::RayTrainWorker", when=lambda: has(STUDY, "/state.pt"))
    result = json.loads(storage.read(f"{STUDY}/study.json"))
    assert result["is_over"] and [trial["status"] for trial in result["trials"]] == ["finished"] * 2
    client = mlflow.MlflowClient(site.env["MLFLOW_TRACKING_URI"])
    parent, *children = (
        client.get_run(json.loads(storage.read(f"{folder}/mlflow_run.json"))["run_id"])
        for folder in (STUDY, *(trial["run"] for trial in result["trials"]))
    )
    assert parent.info.status == "FINISHED" and parent.data.tags["best_trial"] == f"{result['best'][0]:04d}"
    assert [child.data.tags["mlflow.parentRunId"] for child in children] == [parent.info.run_id] * 2
    for child, trial in zip(children, result["trials"], strict=True):
        steps = [metric.step for metric in client.get_metric_history(child.info.run_id, "val/rsum")]
        assert sorted(steps) == [5, 10] and child.data.tags["status"] == "finished"
        assert child.data.metrics["study/worker_s"] == trial["worker_s"]


def test_embedding_loses_a_node(site: Site, run: str) -> None:
    settings = (f"run={run}", f"output={VECTORS}", "split=train", "actors=3", f"cache={site.folder / 'cache'}")
    command = ("retrieval.embed", "tiny", *settings, "batch_size=4", "views=40")  # enough work to be met at it
    site.submit("embedding", *command, task="ray::Embedder", when=lambda: has(VECTORS, "/part-"))
    parts = json.loads(storage.read(f"{VECTORS}/embeddings.json"))["parts"]
    assert len(parts) == SHARDS and sum(part["videos"] for part in parts) == 48


def test_no_secret_is_seen(site: Site) -> None:
    """Secrets reach the nodes by their environment alone. Seen to fail where a job's runtime_env carries one."""
    site.see_commands()
    password = site.planted["MLFLOW_TRACKING_PASSWORD"]
    basic = base64.b64encode(f"somebody:{password}".encode()).decode()
    wanted = {value.encode(): name for name, value in {**site.planted, "the password in a header": basic}.items()}
    looked = 0
    for place, content in everything(site):
        looked += 1
        assert not [name for value, name in wanted.items() if value in content], place
    assert looked > 100
    for name in PRIVATE:
        path = site.folder / name
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert any(value in path.read_bytes() for value in wanted)  # what is searched for is what is used


def test_each_node_has_an_address(site: Site) -> None:
    if not site.config.namespaces:
        pytest.skip("network namespaces need root and iproute2")
    nodes = [node["raylet"] for node in json.loads(site.ask("nodes?view=summary"))["data"]["summary"]]
    addresses = [node["nodeManagerAddress"] for node in nodes if node["state"] == "ALIVE"]
    assert len(addresses) == len(set(addresses)) == 3 and "127.0.0.1" not in addresses


def everything(site: Site) -> Iterator[tuple[str, bytes]]:
    """What others may see: commands of processes, the dashboard, storage, and files, MLflow's among them."""
    yield "commands of processes", "\n".join(site.commands).encode()
    for path in (
        "api/jobs/",
        "logical/actors",
        *(f"api/v0/{what}?detail=1" for what in ("actors", "tasks", "workers")),
    ):
        yield path, site.ask(path)
    for url in ("s3://datasets", "s3://runs"):
        for entry in storage.list_files(url):
            yield entry.url, storage.read(entry.url)
    private = {site.folder / name for name in PRIVATE}
    for folder in (site.folder, Path(local.nodes(site.config).temp)):
        for path in folder.rglob("*"):
            is_data = path.is_relative_to(site.folder / "s3" / "data")  # read above, as others do
            if path.is_file() and not path.is_symlink() and path not in private and not is_data:
                yield str(path), path.read_bytes()
