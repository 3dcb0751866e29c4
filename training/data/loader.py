"""Batches from shards, decoded in DataLoader workers.

Shapes: B videos of this rank, F frames, C channels, H height, W width, L tokens.
"""

import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common import counts, shards
from common.errors import ConfigError, DataError, ProjectError
from common.shards import DatasetIndex, SampleInfo, ShardEntry
from training import models
from training.config import TrainConfig
from training.data import decode
from training.data.cache import ShardCache
from training.data.decode import FrameSettings
from training.data.plan import SampleOrder, caption_turn
from training.model_config import ModelConfig

ROOT = Path(__file__).parents[2]
Item = tuple[int, int, int]  # epoch, shard, row


class Batch(NamedTuple):
    """Training pairs. Pixels stay uint8 until the device."""

    frames_BFCHW: Tensor
    tokens_BL: Tensor
    video_ids: list[str]
    caption_ids: list[str]
    cpu_s: float  # what making it took, over all its samples


class EvalBatch(NamedTuple):
    """Videos with all their captions; `frames_BFCHW` holds views * num_frames frames, view by view."""

    frames_BFCHW: Tensor
    videos: list[SampleInfo]


class Clip(NamedTuple):
    """One sample: its frames and info, which caption has its turn, and the CPU seconds that it took."""

    frames_FCHW: Tensor
    info: SampleInfo
    turn: int
    cpu_s: float


class ClipDataset(Dataset[Clip]):
    """Samples by (epoch, shard, row).

    `seed` None means evaluation: middle frames, centre square.
    """

    def __init__(self, cache: ShardCache, entries: list[ShardEntry], settings: FrameSettings, seed: int | None) -> None:
        self.cache, self.entries, self.settings, self.seed = cache, entries, settings, seed

    def __getitem__(self, item: Item) -> Clip:
        start = time.process_time()  # of all threads: decord decodes in one of its own
        epoch, shard, row = item
        tar, index = self.cache.open(self.entries[shard])
        sample = index.samples[row]
        info = shards.read_info(tar, sample)
        random = None if self.seed is None else decode.draws(self.seed, epoch, info.video_id)
        try:
            frames = decode.decode_clip(shards.read_pictures(tar, sample), self.settings, random)
        except DataError as error:
            raise DataError(f"{self.entries[shard].name}, video {info.video_id}: {error}") from None
        turn = 0
        if self.seed is not None:
            turn = caption_turn(len(info.captions), epoch, self.seed, decode.stable_hash(info.video_id))
        return Clip(frames, info, turn, time.process_time() - start)


class Steps:
    """A batch sampler over the global steps [start, stop) of one rank, across epochs."""

    def __init__(self, order: SampleOrder, start: int, stop: int, rank: int, world_size: int) -> None:
        self.order, self.start, self.stop, self.rank, self.world_size = order, start, stop, rank, world_size

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Item]]:
        for step in range(self.start, self.stop):
            yield self.order.batch(step, self.rank, self.world_size)


def open_cache(config: TrainConfig, dataset_sha256: str) -> ShardCache:
    return ShardCache(config.data.dataset, dataset_sha256, config.data.cache, config.data.cache_bytes)


def sample_order(config: TrainConfig, dataset: DatasetIndex) -> SampleOrder:
    """The order of the training splits' samples. Raises ConfigError, DataError."""
    sizes = [entry.samples for entry in train_entries(config, dataset)]
    return SampleOrder(sizes, config.optim.batch_size, config.data.lanes, config.data.shuffle_shards, config.seed)


def train_entries(config: TrainConfig, dataset: DatasetIndex) -> list[ShardEntry]:
    return [entry for split in config.data.train for entry in dataset.split(split).shards]


def train_loader(
    config: TrainConfig, dataset: DatasetIndex, cache: ShardCache, start: int, rank: int, world_size: int
) -> DataLoader[Batch]:
    """Batches of one rank from step `start` to the last."""
    model = config.model
    settings = FrameSettings(
        model.segments,
        model.num_frames // model.segments,
        models.image_size(model),
        config.data.crop_scale,
        config.data.flip,
    )
    data = ClipDataset(cache, train_entries(config, dataset), settings, config.seed)
    steps = Steps(sample_order(config, dataset), start, config.optim.steps, rank, world_size)
    collate = functools.partial(_collate_pairs, model=model)
    return _loader(data, steps, collate, config.workers.loader_workers or 0)


def eval_loader(
    config: TrainConfig, dataset: DatasetIndex, cache: ShardCache, split: str, rank: int, world_size: int
) -> DataLoader[EvalBatch]:
    """A split's videos once, every `world_size`-th batch of consecutive ones to this rank."""
    settings = eval_frames(config, config.eval.views)
    entries = dataset.split(split).shards
    data = ClipDataset(cache, entries, settings, None)
    items = [(0, shard, row) for shard, entry in enumerate(entries) for row in range(entry.samples)]
    size = config.eval.batch_size
    batches = [items[i : i + size] for i in range(rank * size, len(items), size * world_size)]
    # One process is enough: evaluation reads each clip once, and its start must not cost more than its work.
    return _loader(data, batches, _collate_videos, min(config.workers.loader_workers or 0, 1))


def eval_frames(config: TrainConfig, views: int) -> FrameSettings:
    """The evaluation's frames: `views` clips of num_frames, interleaved in time, centre square."""
    model = config.model
    chunks = views * model.num_frames // model.segments
    return FrameSettings(model.segments, chunks, models.image_size(model))


def check_frames(config: TrainConfig, url: str, dataset: DatasetIndex, split: str, views: int) -> None:
    """Refuse to read more frames of a clip than a dataset of JPEGs has: some would be taken twice.

    Raises:
        ConfigError: with the ways out.
    """
    entries = [entry for entry in dataset.split(split).shards if entry.samples]
    if dataset.payload != "frames" or not entries:
        return
    stored = len(shards.read_marker(url, entries[0].name).samples[0].pictures)
    frames = config.model.num_frames
    if views * frames > stored:
        raise ConfigError(
            f"eval.views={views} of model.num_frames={frames} are {views * frames} frames, the dataset has {stored} "
            "JPEGs a clip: lower one of the two, or build it again with a larger frames.per_segment"
        )


def _loader(
    data: ClipDataset, batches: Steps | list[list[Item]], collate: Callable[[list[Any]], Any], num_workers: int
) -> DataLoader:
    context = None
    if num_workers:
        # Forked children of a process with Ray's or decord's threads deadlock; a fork server has neither.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["training.data.loader"])
        # Python 3.11's fork server ignores the parent's sys.path, and a preload it can't import is dropped silently.
        os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return _Loader(
        data,
        batch_sampler=batches,
        collate_fn=functools.partial(_with_counts, collate),
        num_workers=num_workers,
        multiprocessing_context=context,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_one_thread,
    )


class _Loader(DataLoader[Any]):
    """A DataLoader whose errors are one sentence: torch puts a worker's traceback into the message.

    What its workers counted is counted in the process that reads from it.
    """

    def __iter__(self) -> Any:
        try:
            for batch, counted in super().__iter__():
                counts.so_far.update(counted)
                yield batch
        except ProjectError as error:
            kind = type(error)
            raise kind(str(error).strip().rpartition(f"{kind.__name__}: ")[2]) from None


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)


def _with_counts(collate: Callable[[list[Any]], Any], clips: list[Clip]) -> tuple[Any, dict[str, int]]:
    return collate(clips), counts.take()


def _collate_pairs(clips: list[Clip], model: ModelConfig) -> Batch:
    captions = [clip.info.captions[clip.turn] for clip in clips]
    tokens_BL = models.tokenize(model)([c.text for c in captions])
    return Batch(
        torch.stack([clip.frames_FCHW for clip in clips]),
        tokens_BL,
        [clip.info.video_id for clip in clips],
        [c.id for c in captions],
        sum(clip.cpu_s for clip in clips),
    )


def _collate_videos(clips: list[Clip]) -> EvalBatch:
    return EvalBatch(torch.stack([clip.frames_FCHW for clip in clips]), [clip.info for clip in clips])
