"""Studies on a real Ray cluster: four trials end to end, one that fails, and promotion."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient
from ray.util.state import list_actors

from cluster.local import RayCluster
from common import config as configs
from common.errors import ConfigError, ProjectError, RunError
from datasets_prep.build import build
from datasets_prep.config import PRESETS as BUILDS
from datasets_prep.config import BuildConfig
from training.config import PRESETS, TrainConfig, WorkerConfig
from training.train import connect
from tuning.config import SIZES, STUDIES, PromoteConfig, StudyConfig
from tuning.promote import promote
from tuning.records import Record, Records
from tuning.study import run

Result = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, ray_local: RayCluster) -> Path:
    """Holds the dataset `data` and everything that studies write."""
    if not ray.is_initialized():
        connect()
    root = tmp_path_factory.mktemp("study")
    shapes = [f"source.videos={root / 'videos'}", f"output={root / 'data'}", "shards.max_samples=16"]
    sizes = ["source.num_pairs=8", "source.val_pairs=4", "source.test_pairs=4"]
    build(configs.load(BuildConfig, "moving_shapes", [*shapes, *sizes], BUILDS))
    return root


def tiny(folder: Path, *overrides: str) -> StudyConfig:
    where = {
        "storage": f"{folder / 'studies'}",
        "tracking.uri": f"sqlite:///{folder / 'mlflow.db'}",
        "overrides.data.dataset": f"{folder / 'data'}",
        "overrides.data.cache": f"{folder / 'cache'}",
        "overrides.workers.num_workers": "1",
        "overrides.workers.loader_workers": "0",
        "overrides.optim.steps": "2",
        "max_concurrent": "2",
    }
    return configs.load(StudyConfig, "tiny", [*(f"{k}={v}" for k, v in where.items()), *overrides], STUDIES)


@pytest.fixture(scope="module")
def result(folder: Path) -> Result:
    return run(tiny(folder, "overrides.losses.temperature=0.05"))


def test_four_trials(folder: Path, result: Result) -> None:
    trials = result["trials"]
    assert [(t["number"], t["status"], t["failures"]) for t in trials] == [(i, "finished", 0) for i in range(4)]
    assert len({json.dumps(t["values"]) for t in trials}) == 4
    for trial in trials:
        config = configs.load(TrainConfig, f"{trial['run']}/config.yaml")
        assert config.model.model_dump()["cube_init_std"] == trial["values"]["model.cube_init_std"]
        assert config.losses.caption == trial["values"]["losses.caption"]
        assert [report["step"] for report in trial["reports"]] == [2]
        assert 0 < trial["worker_s"] < trial["seconds"]
    # The nodes have the credentials; no trial's runtime environment, which the dashboard shows, repeats them.
    drivers = [a for a in list_actors(detail=True, limit=1000) if "ImplicitFunc" in a.class_name]
    assert drivers and os.environ["AWS_SECRET_ACCESS_KEY"] not in str(drivers)
    [best] = result["best"]
    assert trials[best]["metric"] == max(t["metric"] for t in trials)
    study = folder / "studies/tiny"
    assert json.loads((study / "study.json").read_text()) == result and result["is_over"]
    assert "Learning curves" in (study / "study.html").read_text()
    assert len(list((study / "trials").iterdir())) == 4


def test_one_parent_and_four_children(folder: Path, result: Result) -> None:
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("text-video-retrieval")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    [parent] = [r for r in runs if r.info.run_name == "tiny"]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(runs) == 5 and len(children) == 4
    assert {r.info.status for r in runs} == {"FINISHED"}
    trial = result["trials"][result["best"][0]]
    assert parent.data.tags["study"] == "tiny"
    assert parent.data.tags["best_run"] == trial["run"]
    assert [a.path for a in client.list_artifacts(parent.info.run_id) if a.path == "study.html"]
    [best] = [r for r in children if r.data.tags["best"] == "true"]
    assert best.data.tags["run"] == trial["run"] and best.data.tags["status"] == "finished"
    assert best.data.metrics["study/worker_s"] == trial["worker_s"]
    assert best.data.metrics["study/seconds"] == trial["seconds"]
    history = client.get_metric_history(best.info.run_id, "val/rsum")
    assert max(m.value for m in history) == pytest.approx(trial["metric"])
    # It started from losses.temperature; a random CLIP does from 0.07.
    assert client.get_metric_history(best.info.run_id, "train/logit_scale")[0].value == pytest.approx(20, rel=0.01)


def test_again_keeps_what_has_ended(folder: Path, result: Result) -> None:
    """Nor is anything logged twice in MLflow."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    runs = [r.info.run_id for r in client.search_runs(["1"])]
    before = {t["run"]: Path(t["run"], "result.json").stat().st_mtime_ns for t in result["trials"]}
    again = run(tiny(folder, "overrides.losses.temperature=0.05"))
    assert again == result
    assert {r: Path(r, "result.json").stat().st_mtime_ns for r in before} == before
    assert [r.info.run_id for r in client.search_runs(["1"])] == runs
    assert all(len(client.get_metric_history(one, "study/worker_s")) <= 1 for one in runs)
    with pytest.raises(RunError, match=r"began otherwise \(.*base.optim.steps was 2, is 4; seed was 0, is 1\)"):
        run(tiny(folder, "seed=1", "overrides.optim.steps=4"))


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("overrides.data.val=vall", "vall"),
        ("overrides.optim.batch_size=100000", "optim.batch_size=100000"),
        ('space={"model.cube_layers": {"choice": [[0, 1], [50, 60]]}}', r"model.cube_layers=\[50, 60\]"),
    ],
)
def test_what_no_trial_could_do_is_refused_before_the_first(folder: Path, override: str, told: str) -> None:
    """Else each trial would find out."""
    with pytest.raises(ProjectError, match=told):
        run(tiny(folder, "name=wrong", override))
    assert not (folder / "studies/wrong").exists()


def test_another_dataset_at_the_same_place_is_refused(folder: Path, result: Result) -> None:
    """Its trials would be compared with those of the old one."""
    identity = folder / "studies/tiny/identity.json"
    theirs = identity.read_text()
    identity.write_text(theirs.replace(result["dataset_sha256"], "0" * 64))
    with pytest.raises(RunError, match=r"base.data.sha256 was \"000"):
        run(tiny(folder, "overrides.losses.temperature=0.05"))
    identity.write_text(theirs)


def test_promote(folder: Path, result: Result) -> None:
    chosen = PromoteConfig(study=str(folder / "studies/tiny"), preset="winner", folder=str(folder))
    path = promote(chosen)
    config = configs.load(TrainConfig, "winner", presets=folder)
    for key, value in result["trials"][result["best"][0]]["values"].items():
        assert key in path.read_text().split("\nrun:")[0]
        section, name = key.split(".")
        assert config.model_dump()[section][name] == value
    assert (
        config.run.name == "winner"
        and config.workers.model_dump(include=set(SIZES)) == WorkerConfig().model_dump(include=set(SIZES))
        and str(folder) not in config.tracking.uri + config.data.cache
    )
    with pytest.raises(ConfigError, match=r"winner.yaml already exists"):
        promote(chosen)
    with pytest.raises(RunError, match="trial=9 has no result in study tiny; those that have: 0, 1, 2, 3"):
        promote(chosen.model_copy(update={"preset": "other", "trial": 9}))
    with pytest.raises(RunError, match=r"no study\.json"):
        promote(chosen.model_copy(update={"preset": "other", "study": str(folder)}))
    assert not (PRESETS / "winner.yaml").exists()


@pytest.mark.slow
def test_one_that_fails_is_recorded_and_the_study_goes_on(folder: Path) -> None:
    """A loss that is not finite fails alike each time, so it is not tried again."""
    grid = ["searcher=grid", "trials=null", 'space={"optim.lr": {"choice": [1e30, 1e-3]}}']
    result = run(tiny(folder, "name=mixed", *grid, "overrides.optim.steps=3"))
    assert [(t["status"], bool(t["error"])) for t in result["trials"]] == [("failed", True), ("finished", False)]
    assert "the loss is" in result["trials"][0]["error"] and result["best"] == [1]
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    [failed] = client.search_runs(["1"], "tags.study = 'mixed' and tags.status = 'failed'")
    assert failed.info.status == "FAILED" and "the loss is" in failed.data.tags["error"]


def test_all_failed_is_told(folder: Path) -> None:
    """And what has failed as often as it may is not started again."""
    study = tiny(folder, "name=lost", "trials=1")
    lost = Record(0, {"losses.caption": 0.5}, "gone", status="failed", failures=3, error="a node died")
    Records(f"{folder}/studies/lost").save(lost)
    with pytest.raises(RunError, match=r"all 1 trials of study lost failed: a node died"):
        run(study)
