"""A tiny prepared dataset on the real S3 server, and the settings of runs on it."""

from pathlib import Path

import pytest

from cluster.local import S3Server
from common import config as configs
from common.config import apply
from datasets_prep.build import build
from datasets_prep.config import PRESETS as BUILD_PRESETS
from datasets_prep.config import BuildConfig
from training.config import PRESETS, TrainConfig


@pytest.fixture(scope="session")
def shapes(s3_server: S3Server, ray_local: object, tmp_path_factory: pytest.TempPathFactory) -> str:
    """URL of the moving shapes, 40 clips in three splits."""
    url = "s3://tests/shapes"
    videos = tmp_path_factory.mktemp("shapes")
    config = configs.load(BuildConfig, "tiny", [f"output={url}", f"source.videos={videos}"], BUILD_PRESETS)
    build(config)
    return url


def tiny_config(shapes: str, storage: str, folder: Path) -> TrainConfig:
    """The preset `tiny` on that set: two ranks, four steps; runs on S3, cache and MLflow's sqlite in a folder."""
    config = configs.load(TrainConfig, "tiny", [f"data.dataset={shapes}"], PRESETS)
    return apply(
        config,
        {
            "run.storage": storage,
            "data.cache": str(folder / "cache"),
            "tracking.uri": f"sqlite:///{folder / 'mlflow.db'}",
            "eval.twins": True,
            "workers.loader_workers": 0,
        },
    )


@pytest.fixture
def tiny(shapes: str, s3: str, tmp_path: Path) -> TrainConfig:
    return tiny_config(shapes, s3, tmp_path)
