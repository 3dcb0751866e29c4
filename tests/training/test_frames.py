"""The payload `frames`: JPEGs instead of an mp4, read by training, evaluation and the contact sheet alike."""

from collections.abc import Callable
from pathlib import Path

import pytest
import ray
import torch

from common import config as configs
from common import shards
from common.config import apply, validate
from common.errors import ConfigError
from datasets_prep.build import build
from datasets_prep.config import PRESETS, BuildConfig
from datasets_prep.verify import verify
from training.config import EvaluateConfig, TrainConfig
from training.data import pictures
from training.data.loader import check_frames, eval_loader, open_cache, train_loader
from training.evaluate import evaluate_runs
from training.train import train


@pytest.fixture(scope="module")
def jpegs(shapes: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same clips as `shapes`, every one of their 30 frames a JPEG."""
    folder = tmp_path_factory.mktemp("jpegs")
    every = ["payload=frames", "frames.segments=6", "frames.per_segment=5", "frames.quality=95"]
    build(configs.load(BuildConfig, "tiny", [f"output={folder}/out", f"source.videos={folder}/in", *every], PRESETS))
    return f"{folder}/out"


def batches(config: TrainConfig, url: str, tmp_path: Path) -> list[torch.Tensor]:
    config = apply(config, {"data.dataset": url, "data.cache": str(tmp_path / "cache")})
    dataset, sha256 = shards.read_dataset(url)
    cache = open_cache(config, sha256)
    train, evaluation = train_loader(config, dataset, cache, 0, 0, 1), eval_loader(config, dataset, cache, "test", 0, 1)
    return [batch.frames_BFCHW for loader in (train, evaluation) for batch in loader]


def test_training_and_evaluation_see_the_same_frames(
    tiny: TrainConfig, shapes: str, jpegs: str, tmp_path: Path
) -> None:
    assert shards.read_dataset(jpegs)[0].payload == "frames"
    for video, frames in zip(batches(tiny, shapes, tmp_path), batches(tiny, jpegs, tmp_path), strict=True):
        difference = (video.float() - frames.float()).abs().mean(dim=(2, 3, 4))  # per video and frame
        assert video.shape == frames.shape and difference.max() < 4


def evaluated(config: TrainConfig) -> None:
    evaluate_runs([validate(EvaluateConfig, config.model_dump())])


@pytest.mark.parametrize("command", [train, evaluated])
def test_more_frames_than_there_are_jpegs_are_refused(
    command: Callable[[TrainConfig], object], tiny: TrainConfig, jpegs: str
) -> None:
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    dataset, _ = shards.read_dataset(jpegs)
    check_frames(tiny, jpegs, dataset, "test", views=5)
    with pytest.raises(ConfigError, match=r"eval\.views=6 .* are 36 frames, the dataset has 30 JPEGs a clip: lower"):
        command(apply(tiny, {"data.dataset": jpegs, "eval.views": 6}))


def test_verify_and_contact_sheet_read_them(jpegs: str) -> None:
    assert verify(jpegs) == 40
    marker = shards.read_marker(jpegs, "test/shard-000000.tar")
    sample = marker.samples[1]
    assert len(sample.pictures) == 30
    offset, size = shards.span_of(sample)
    with open(f"{jpegs}/test/shard-000000.tar", "rb") as tar:
        expected = shards.read_pictures(tar, sample)
        tar.seek(offset)
        assert shards.pictures_in(tar.read(size)) == expected
    assert len(pictures.frames(jpegs, "test/shard-000000.tar", offset, size, 6)) == 6
