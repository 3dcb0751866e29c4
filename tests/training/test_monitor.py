"""What Prometheus reads of a run, by the file that Ray writes for it."""

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from cluster.local import RayCluster
from common import config as configs
from common import counts, shards
from common.config import apply, dump
from tests.entry import REPOSITORY
from tests.faults import wait_until
from tests.retrieval.conftest import SHARD_SIZES, write_dataset
from training.config import PRESETS, TrainConfig
from training.data.loader import eval_loader, open_cache
from training.monitor import GAUGES
from training.weights import run_url


def scraped(nodes: RayCluster, run: str) -> dict[str, float]:
    """The values of a run's metrics, added up over processes and nodes."""
    (found,) = json.loads((Path(nodes.temp) / "0" / "prom_metrics_service_discovery.json").read_text())
    values: dict[str, float] = {}
    for target in found["targets"]:
        try:
            with urllib.request.urlopen(f"http://{target}/metrics", timeout=10) as answer:
                text = answer.read().decode()
        except OSError:  # Ray names its autoscaler too, whether there is one or not
            continue
        for name, labels, value in re.findall(r"^ray_training_(\w+){(.*)} (\S+)$", text, re.MULTILINE):
            if f'run="{run}"' in labels:
                values[name] = values.get(name, 0.0) + float(value)
    return values


@pytest.mark.parametrize("loader_workers", [0, 1])
def test_what_decoding_processes_count_is_told_where_they_are_read(tmp_path: Path, loader_workers: int):
    """Once. Seen to fail where they keep it, and where the reading process does not add it up."""
    url = str(write_dataset(tmp_path / "data"))
    config = configs.load(TrainConfig, "tiny", [f"data.dataset={url}", f"data.cache={tmp_path / 'cache'}"], PRESETS)
    config = apply(config, {"workers.loader_workers": loader_workers, "eval.batch_size": 1})
    dataset, sha256 = shards.read_dataset(url)
    counts.take()
    videos = [batch.videos for batch in eval_loader(config, dataset, open_cache(config, sha256), "test", 0, 1)]
    assert len(videos) == sum(SHARD_SIZES)
    assert counts.take() == {"shards_cached": len(SHARD_SIZES)}


@pytest.mark.slow
def test_prometheus_sees_a_run(ray_local: RayCluster, tiny: TrainConfig, tmp_path: Path):
    """Shards are counted in the processes that decode, each of which belongs to one of two ranks."""
    config = apply(tiny, {"optim.steps": 100_000, "eval.every": 100_000, "workers.loader_workers": 1})
    (tmp_path / "run.yaml").write_text(dump(config))
    index, _ = shards.read_dataset(config.data.dataset)
    count = len(index.splits["train"].shards)
    command = [sys.executable, "-m", "training.train", str(tmp_path / "run.yaml")]
    with open(tmp_path / "log", "wb") as log:
        driver = subprocess.Popen(command, cwd=REPOSITORY, stdout=log, stderr=log)
    try:

        def seen() -> dict[str, float]:
            assert driver.poll() is None, (tmp_path / "log").read_text()
            values = scraped(ray_local, run_url(config))
            return values if values.get("shards_cached_total") == count else {}

        values = wait_until(seen, 400)
    finally:
        driver.kill()
        driver.wait()
    assert values.keys() >= {*GAUGES, "shards_cached_total"}
    assert 0 < values["loss"] < 100 and 0 <= values["data_wait"] <= 1 and values["cores_needed"] > 0
    assert abs(values["samples_per_s"] * values["step_s"] / config.optim.batch_size - 1) < 1e-6
