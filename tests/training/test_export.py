"""A run's weights for everyone else."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common import config as configs
from common import storage
from common.config import apply, dump
from common.errors import RunError
from tests.conftest import REPOSITORY
from tests.entry import assert_refused, run
from training import models, weights
from training.config import PRESETS, TrainConfig
from training.export import OPEN_CLIP, export
from training.models.clip import open_clip

PLAIN = {"model": {"name": "mean_pool", "backbone": "tiny", "num_frames": 4}, "losses.caption": 0}


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    config = configs.load(TrainConfig, "tiny", ["data.dataset=s3://x/y"], PRESETS)
    return apply(config, {"run.storage": str(tmp_path), "run.name": "run"})


def write_run(config: TrainConfig) -> str:
    torch.manual_seed(0)
    url = weights.run_url(config)
    storage.publish_bytes(dump(config).encode(), storage.join(url, "config.yaml"))
    weights.save_best(url, models.build(config.model), 3, {"r1": 0.5})
    return url


def test_an_export_is_a_run_to_whoever_reads_it(config: TrainConfig, tmp_path: Path):
    run_folder, output = write_run(config), str(tmp_path / "out")
    finished = run("training.export", run_folder, output)
    assert finished.code == 0 and weights.best_url(output) in finished.out, finished.err
    assert "no open_clip_model.safetensors: prompt_switch changes" in finished.err
    again, model = weights.load_run(output)
    _, original = weights.load_run(run_folder)
    assert again == config and not Path(output, OPEN_CLIP).exists()
    for name, value in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


@pytest.mark.parametrize("changes", [PLAIN, {**PLAIN, "model": {**PLAIN["model"], "name": "prompt_switch",
    "cube": False, "switch": "off", "aggregation": False}}])  # fmt: skip
def test_open_clip_reads_a_plain_model(config: TrainConfig, tmp_path: Path, changes: dict):
    export(write_run(apply(config, changes)), str(tmp_path / "out"))
    _, model = weights.load_run(str(tmp_path / "out"))
    theirs = open_clip.create_model("tiny", pretrained=str(tmp_path / "out" / OPEN_CLIP)).eval()
    pixels = torch.randn(2, 3, *theirs.visual.image_size)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode_image(pixels), model.frame_features(pixels[:, None])[:, 0])


def test_weights_are_read_without_ray(config: TrainConfig):
    code = "import sys; from training.weights import load_run; load_run(sys.argv[1]); assert 'ray' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, write_run(config)], cwd=REPOSITORY, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_what_is_no_run_is_one_sentence(tmp_path: Path):
    with pytest.raises(RunError, match="is not the folder of a run"):
        export(str(tmp_path / "nothing"), str(tmp_path / "out"))
    assert_refused(run("training.export", "x"), "expected a run and an output, got 1 arguments")
