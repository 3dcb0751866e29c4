"""Tars as others write them, and what training reads of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import webdataset

from common import config as configs
from common import shards
from common.shards import ShardIndex
from datasets_prep.config import IndexConfig
from training.config import PRESETS, TrainConfig
from training.data.loader import eval_loader, open_cache, train_loader

Sample = dict[str, Any]


def write_tar(path: Path, samples: Mapping[str, Sample]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for key, sample in samples.items():
            writer.write({"__key__": key, **sample})


def video2dataset(clip: bytes, row: int, number: int = 0) -> Sample:
    """What video2dataset writes for the clip `number` of a row with `videoid`, its keys and nulls included."""
    notes = {"url": "http://x/a.mp4", "videoid": f"v{row}", "caption": f"clip {row} {number}", "error_message": None}
    notes |= {"clips": [[0.0, 2.0]], "key": f"{row:08d}_{number:05d}", "status": "success", "yt_meta_dict": None}
    return {"mp4": clip, "txt": f"clip {row} {number}", "json": notes, "m4a": b"sound", "jpg": b"a thumbnail"}


def tars_of_video2dataset(folder: Path, clip: bytes) -> None:
    """Two tars of six clips, two of each row, with the statistics and the table that lie beside them."""
    for tar in range(2):
        samples = [(row, number) for row in range(3 * tar, 3 * tar + 3) for number in range(2)]
        write_tar(
            folder / f"{tar:05d}.tar",
            {f"{row:08d}_{number:05d}": video2dataset(clip, row, number) for row, number in samples},
        )
        (folder / f"{tar:05d}_stats.json").write_text('{"count": 3}')
        (folder / f"{tar:05d}.parquet").write_bytes(b"PAR1")


def tars_of_open_clip(folder: Path, clip: bytes) -> None:
    """A text beside each video, nothing else; keys that start anew in every split."""
    # A local folder lists train before train-more, S3 after it.
    for split, rows in (("train", range(8)), ("train-more", range(8, 10)), ("val", range(4))):
        write_tar(folder / f"{split}/000.tar", {f"{i:04d}": {"mp4": clip, "txt": f"video {i}\n"} for i in rows})


def read_by_training(url: str, cache: Path, split: str) -> tuple[set[str], set[str]]:
    """The videos of all training batches of an epoch, and those of an evaluation of `split`."""
    values = {"data.dataset": url, "data.cache": str(cache), "workers.loader_workers": 0, "optim.batch_size": 4}
    config = configs.apply(configs.load(TrainConfig, "tiny", [], PRESETS), {**values, "optim.steps": 2})
    dataset, sha256 = shards.read_dataset(url)
    opened = open_cache(config, sha256)
    trained = set[str]()
    for batch in train_loader(config, dataset, opened, 0, 0, 1):
        assert tuple(batch.frames_BFCHW.shape[:3]) == (4, 6, 3)
        assert batch.frames_BFCHW.float().std() > 1
        trained |= set(batch.video_ids)
    evaluated = {v.video_id for batch in eval_loader(config, dataset, opened, split, 0, 1) for v in batch.videos}
    return trained, evaluated


def load(folder: Path | str, **values: Any) -> IndexConfig:
    return configs.validate(IndexConfig, {"folder": str(folder), **values})


def marker(folder: Path, name: str) -> ShardIndex:
    return shards.read_marker(str(folder), name)
