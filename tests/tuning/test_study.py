"""Studies on a real Ray cluster: four trials end to end, one that fails throughout, and promotion."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from mlflow import MlflowClient
from ray.util.state import list_actors

from cluster.local import RayCluster
from common import config as configs
from common.errors import ConfigError, RunError
from datasets_prep.build import build
from datasets_prep.config import PRESETS as BUILDS
from datasets_prep.config import BuildConfig
from training.config import PRESETS, TrainConfig
from training.train import connect
from tuning.config import STUDIES, PromoteConfig, StudyConfig
from tuning.promote import promote
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
    return run(tiny(folder))


def test_four_trials(folder: Path, result: Result) -> None:
    assert [t["status"] for t in result["trials"]] == ["finished"] * 4
    assert len({json.dumps(t["values"]) for t in result["trials"]}) == 4
    for trial in result["trials"]:
        config = configs.load(TrainConfig, f"{trial['run']}/config.yaml")
        assert config.model.model_dump()["cube_init_std"] == trial["values"]["model.cube_init_std"]
        assert config.losses.caption == trial["values"]["losses.caption"]
    # The nodes have the credentials; no trial's runtime environment, which the dashboard shows, repeats them.
    trials = [a for a in list_actors(detail=True, limit=1000) if "ImplicitFunc" in a.class_name]
    assert trials and os.environ["AWS_SECRET_ACCESS_KEY"] not in str(trials)
    assert result["best"]["metric"] == max(t["metric"] for t in result["trials"])
    assert json.loads((folder / "studies/tiny/study.json").read_text()) == result


def test_one_parent_and_four_children(folder: Path, result: Result) -> None:
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("text-video-retrieval")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    [parent] = [r for r in runs if r.info.run_name == "tiny"]
    children = [r for r in runs if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(runs) == 5 and len(children) == 4
    assert {r.info.status for r in runs} == {"FINISHED"}
    assert parent.data.tags["study"] == "tiny"
    assert parent.data.tags["best_run"] == result["best"]["run"]
    [best] = [r for r in children if r.data.tags["best"] == "true"]
    assert best.data.tags["run"] == result["best"]["run"]
    history = client.get_metric_history(best.info.run_id, "val/rsum")
    assert max(m.value for m in history) == pytest.approx(result["best"]["metric"])


def test_again_keeps_finished_trials(folder: Path, result: Result) -> None:
    before = {t["run"]: Path(t["run"], "result.json").stat().st_mtime_ns for t in result["trials"]}
    again = run(tiny(folder))
    assert again == result
    assert {r: Path(r, "result.json").stat().st_mtime_ns for r in before} == before
    with pytest.raises(RunError, match="began with another seed, base"):
        run(tiny(folder, "seed=1", "overrides.optim.steps=4"))


def test_promote(folder: Path, result: Result) -> None:
    chosen = PromoteConfig(study=str(folder / "studies/tiny"), preset="winner", folder=str(folder))
    path = promote(chosen)
    config = configs.load(TrainConfig, "winner", presets=folder)
    for key, value in result["best"]["values"].items():
        assert key in path.read_text().split("\nrun:")[0]
        section, name = key.split(".")
        assert config.model_dump()[section][name] == value
    assert config.run.name == "winner" and str(folder) not in config.tracking.uri
    with pytest.raises(ConfigError, match=r"winner.yaml already exists"):
        promote(chosen)
    with pytest.raises(RunError, match="trial=nobody is not one of"):
        promote(chosen.model_copy(update={"preset": "other", "trial": "nobody"}))
    with pytest.raises(RunError, match=r"no study\.json"):
        promote(chosen.model_copy(update={"preset": "other", "study": str(folder)}))
    assert not (PRESETS / "winner.yaml").exists()


def test_all_failed(folder: Path) -> None:
    # Each value is good with the base, not with the other.
    clash = '{"model.num_frames": {"choice": [6]}, "model.num_prompts": {"choice": [12]}}'
    base = configs.load(TrainConfig, "tiny", ["model.num_frames=12"], PRESETS)
    (folder / "base.yaml").write_text(configs.dump(base))
    study = tiny(folder, "name=clash", f"base={folder / 'base.yaml'}", "trials=2", f"space={clash}")
    with pytest.raises(RunError, match=r"all 2 trials of study clash failed: .*model.num_frames=6 is no multiple"):
        run(study)
    assert not (folder / "studies/clash/study.json").exists()


@pytest.mark.slow
def test_asha_stops_trials_and_frees_their_workers(folder: Path) -> None:
    space = '{"optim.lr_new": {"loguniform": [1e-6, 1.0]}, "optim.lr": {"loguniform": [1e-6, 0.1]}}'
    search = ["searcher=optuna", "scheduler=asha", "reduction_factor=2", "metric=mnr", "mode=min", f"space={space}"]
    length = ["overrides.optim.steps=6", "overrides.eval.every=1", "trials=4", "max_concurrent=1"]
    result = run(tiny(folder, "name=asha", *search, *length))
    statuses = [t["status"] for t in result["trials"]]
    assert set(statuses) == {"finished", "stopped"}
    assert result["best"]["metric"] == min(t["metric"] for t in result["trials"])
    deadline = time.monotonic() + 60  # Ray's cleaner looks every few seconds whether a stopped trial's driver lives
    while (held := groups()) and time.monotonic() < deadline:
        time.sleep(1)
    assert held == []
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    runs = client.search_runs(["1"], "tags.study = 'asha'")
    assert len(runs) == 5 and {r.info.status for r in runs} == {"FINISHED"}


def groups() -> list[dict[str, Any]]:
    """The placement groups that hold resources."""
    return [g for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]
