"""Whatever is killed during a study, the same command goes on, and every trial ends with a result or a reason."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from cluster.local import RayCluster, S3Server, start_ray
from common import config as configs
from common import storage
from tests.conftest import RAY_FOLDER, REPOSITORY
from tests.faults import Proxy, kill, kill_node, wait_until
from tuning.config import STUDIES, StudyConfig
from tuning.records import Record, Records
from tuning.space import resolve, trial_config
from tuning.stopping import is_behind

pytestmark = pytest.mark.slow
# Ray's own polls at a pace for tests; Train reads them in the driver and hands them to its processes.
PACE = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}


@pytest.fixture(scope="module")
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    """Between the cluster and the S3 server; it notes which shards are read."""
    proxy = Proxy(s3_server.env["AWS_ENDPOINT_URL"])
    with proxy.serving() as url, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        yield proxy


@pytest.fixture(scope="module")
def nodes(proxy: Proxy) -> Iterator[RayCluster]:
    """Three nodes, of which tests may kill all but the first."""
    env = {k: v for k, v in os.environ.items() if k.startswith("AWS_")}
    cluster = start_ray(RAY_FOLDER / "tuning", num_nodes=3, cpus_per_node=1, env=env)
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def dataset(nodes: RayCluster) -> str:
    url = "s3://tests/tuning-shapes"
    command = [sys.executable, "-m", "datasets_prep.build", "tiny", f"output={url}"]
    subprocess.run(command, env={**os.environ, **nodes.env}, cwd=REPOSITORY, check=True)
    return url


class Study:
    """A study, started and started again as a user does, with its log."""

    def __init__(self, nodes: RayCluster, dataset: str, folder: Path, *overrides: str) -> None:
        self.nodes, self.log = nodes, folder / "log"
        self.name = f"study-{os.urandom(4).hex()}"
        values = [
            f"name={self.name}",
            "storage=s3://tests/studies",
            f"tracking.uri=sqlite:///{folder / 'mlflow.db'}",
            f"overrides.data.dataset={dataset}",
            f"overrides.data.cache={folder / 'cache'}",
            "overrides.workers.num_workers=1",
            "overrides.workers.loader_workers=0",
            "overrides.workers.start_timeout_s=60",
            "overrides.eval.every=3",
        ]
        self.arguments = [*values, *overrides]
        self.config = configs.load(StudyConfig, "tiny", self.arguments, STUDIES)
        self.client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")

    def start(self, *overrides: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tuning.study", "tiny", *self.arguments, *overrides]
        with open(self.log, "ab") as file:
            return subprocess.Popen(
                command, env={**os.environ, **PACE, **self.nodes.env}, cwd=REPOSITORY, stdout=file, stderr=file
            )

    def finish(self, driver: subprocess.Popen[bytes], timeout_s: float = 500) -> dict[str, Any]:
        assert driver.wait(timeout_s) == 0, self.log.read_text()[-5000:]
        return json.loads(storage.read(f"s3://tests/studies/{self.name}/study.json"))

    def records(self) -> Records:
        return Records(f"s3://tests/studies/{self.name}")

    def wait_for(self, count: int) -> list[Record]:
        """The trials that have ended, once there are so many."""

        def ended() -> list[Record]:
            found = [r for r in self.records() if r.status != "running"]
            return found if len(found) >= count else []

        return wait_until(ended, 300)

    def check_mlflow(self, result: dict[str, Any]) -> None:
        """One run for the study and one for each trial, and no step twice."""
        runs = self.client.search_runs(["1"])
        [parent] = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
        children = {r.data.tags["trial"]: r for r in runs if "mlflow.parentRunId" in r.data.tags}
        assert len(runs) == 1 + len(children) and parent.info.status == "FINISHED"
        assert sorted(children) == [f"{t['number']:04d}" for t in result["trials"]]
        for trial in result["trials"]:
            run = children[f"{trial['number']:04d}"]
            assert run.data.tags["status"] == trial["status"]
            steps = [m.step for m in self.client.get_metric_history(run.info.run_id, "val/rsum")]
            assert sorted(steps) == sorted(set(steps)) and {r["step"] for r in trial["reports"]} <= set(steps)


def test_a_study_survives(nodes: RayCluster, dataset: str, tmp_path: Path) -> None:
    """Its driver, a node under a trial, and a trial's driver are killed; then it ends as if nothing had been."""
    search = ["searcher=tpe", "scheduler=asha", "reduction_factor=2", "trials=8", "max_concurrent=2"]
    space = '{"optim.lr_new": {"loguniform": [1e-6, 1.0]}, "optim.lr": {"loguniform": [1e-6, 0.1]}}'
    study = Study(nodes, dataset, tmp_path, *search, f"space={space}", "overrides.optim.steps=15")
    driver = study.start()
    before = {r.number: r for r in study.wait_for(2)}
    driver.kill()
    driver.wait()
    driver = study.start()
    study.wait_for(3)
    kill_node(nodes, "ray::RayTrainWorker")
    study.wait_for(4)
    kill(nodes.mark, "ray::ImplicitFunc")
    result = study.finish(driver)

    assert [t["number"] for t in result["trials"]] == list(range(8)) and result["is_over"]
    assert {t["status"] for t in result["trials"]} <= {"finished", "stopped"}
    assert sum(t["failures"] for t in result["trials"]) >= 1  # the trial whose driver was killed was started again
    after = {r.number: r for r in study.records()}
    assert {n: after[n] for n in before} == before
    check_decisions(study)
    study.check_mlflow(result)


def check_decisions(study: Study) -> None:
    """Each report, with those that were there before it, leads to the decision that was taken."""
    base = resolve(study.config)
    records = study.records()
    stopped_after = {r.number: r.step for r in records if r.status == "stopped"}
    for one in records:
        config = trial_config(study.config, base, one.values)
        for length in range(1, len(one.reports) + 1):
            now = one.reports[length - 1]["time"]
            known = study.records()
            for r in known:
                r.reports = [report for report in r.reports if report["time"] <= now]
            judged = known.all[one.number]
            stops = is_behind(study.config, config, judged, known)
            assert stops == (stopped_after.get(one.number) == judged.step), (one.number, length)


def test_a_budget_ends_a_start_and_trials_can_be_added(
    nodes: RayCluster, dataset: str, tmp_path: Path, proxy: Proxy
) -> None:
    """And the trials of a node read each shard once."""
    reads: list[str] = []
    proxy.fault = lambda method, path: (reads.append(path) if method == "GET" and ".tar" in path else None) or "none"
    study = Study(nodes, dataset, tmp_path, "trials=1", "overrides.optim.steps=6")
    first = study.finish(study.start("time_budget_s=3"))
    assert not first["is_over"] and [t["status"] for t in first["trials"]] == ["running"]
    assert "the same command goes on" in study.log.read_text()
    second = study.finish(study.start("trials=3"))
    proxy.fault = lambda method, path: "none"
    assert second["is_over"] and [t["status"] for t in second["trials"]] == ["finished"] * 3
    assert second["trials"][0]["values"] == first["trials"][0]["values"]
    assert reads and len(reads) == len(set(reads))
    study.check_mlflow(second)


def test_confirm_trains_again_with_other_seeds(nodes: RayCluster, dataset: str, tmp_path: Path) -> None:
    study = Study(nodes, dataset, tmp_path, "trials=1", "overrides.optim.steps=3")
    study.finish(study.start())
    url = f"s3://tests/studies/{study.name}"
    command = [sys.executable, "-m", "tuning.promote", url, "preset=best", f"folder={tmp_path}", "--confirm", "2"]
    done = subprocess.run(
        command, env={**os.environ, **PACE, **nodes.env}, cwd=REPOSITORY, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    header = (tmp_path / "best.yaml").read_text().split("\nrun:")[0]
    assert "# Confirmed with 2 other seeds: val rsum" in header and " at the end test " in header
    seeds = json.loads(storage.read(f"{url}/{study.name}-0000-seeds/study.json"))
    assert [t["values"] for t in seeds["trials"]] == [{"seed": 1}, {"seed": 2}]
    assert "Confirmed with 2 other seeds" in done.stdout


def test_stopped_trials_free_their_workers(nodes: RayCluster, dataset: str, tmp_path: Path) -> None:
    search = ["scheduler=asha", "reduction_factor=2", "trials=3", "max_concurrent=1", "searcher=grid"]
    rates = '{"optim.lr": {"choice": [1e-3, 1e-9, 1e-10]}, "optim.lr_new": {"choice": [1e-9]}}'
    study = Study(
        nodes, dataset, tmp_path, *search, f"space={rates}", "overrides.optim.steps=30", "overrides.eval.every=10"
    )
    result = study.finish(study.start())
    assert "stopped" in {t["status"] for t in result["trials"]}
    wait_until(lambda: placement_groups(nodes) == {"REMOVED"}, 60)
    study.check_mlflow(result)


def placement_groups(nodes: RayCluster) -> set[str]:
    """The states of all that there were. In a process of its own: this one has the token of another cluster."""
    code = (
        "import ray; ray.init(logging_level='ERROR')\n"
        "print(*(group['state'] for group in ray.util.placement_group_table().values()))"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **nodes.env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())
