"""A run's two towers at work: sentences → vectors, and shards → parts of an embeddings folder. Free of Ray.

Shapes: B videos of a batch, F frames, T texts, V videos of a shard, D joint width, ... what is kept of a video.
"""

import functools
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common import shards, storage
from common.errors import DataError, RunError
from common.shards import SampleIndex, SampleInfo, ShardEntry
from retrieval.config import EmbedConfig
from retrieval.embeddings import Kept, Source, Videos, part_name, write_part
from retrieval.features import write_features
from training import models
from training.config import TrainConfig
from training.data import decode
from training.data.cache import ShardCache
from training.data.loader import eval_frames
from training.encode import encode_clips
from training.models import Retriever, TwoTower
from training.weights import load_run, weights_sha256


def load_two_tower(run: str) -> tuple[TrainConfig, TwoTower]:
    """A run's configuration and model. Raises RunError if it gives a video no vector of its own."""
    config, model = load_run(run)
    if not isinstance(model, TwoTower):
        assert config.model.scorer is not None
        raise RunError(
            f"run {run} has model.scorer={config.model.scorer.name}, which scores a video only together with a query: "
            "there is no vector to embed or index. Choose a run without a scorer"
        )
    return config, model


@torch.inference_mode()
def encode_sentences(config: TrainConfig, model: TwoTower, sentences: list[str]) -> NDArray[np.float32]:
    """Unit vectors TD."""
    return model.encode_text(models.tokenize(config.model)(sentences)).vector_TD.float().numpy()


@torch.inference_mode()
def kept_shape(config: TrainConfig, model: Retriever, views: int) -> tuple[int, ...]:
    """The shape of what is kept of a video: that of a black one."""
    size = models.image_size(config.model)
    frames_1FCHW = torch.zeros(1, views * config.model.num_frames, 3, size, size, dtype=torch.uint8)
    return tuple(encode_clips(model, frames_1FCHW, views).shape[1:])


class Embedder:
    """Encodes shards of one dataset. It loads its model when it is first used, so it may be rebuilt at any time."""

    def __init__(self, config: EmbedConfig, source: Source, device: str) -> None:
        self.config, self.source, self.device = config, source, device
        self.cache = ShardCache(source.dataset, source.dataset_sha256, config.cache, config.cache_bytes)

    @functools.cached_property
    def loaded(self) -> tuple[TrainConfig, Retriever]:
        run = self.source.run
        config, model = load_run(run)
        if weights_sha256(run) != self.source.weights_sha256:
            raise RunError(
                f"the best weights of {run} changed while it was being embedded: let it finish training, then "
                "embed it into a new output"
            )
        torch.set_num_threads(self.config.cpus_per_actor)
        return config, model.to(self.device)

    def start(self) -> None:
        """Load the model."""
        _ = self.loaded

    def embed(self, entry: ShardEntry, number: int) -> int:
        """Write the part of a shard; returns its number of videos. Raises DataError naming shard and video."""
        model = self.loaded[1]
        tar, index = self.cache.open(entry)
        parts = [np.zeros((0, *self.source.shape), self.source.dtype)]
        infos: list[SampleInfo] = []
        for infos_B, frames_BFCHW in self._batches(entry.name, tar, index.samples):
            with torch.inference_mode():
                kept_B = encode_clips(model, frames_BFCHW.to(self.device), self.source.views).float().cpu().numpy()
            with np.errstate(over="ignore"):  # it is looked for below
                parts.append(kept_B.astype(self.source.dtype))
            _check_finite(parts[-1], infos_B, entry.name)
            infos += infos_B
        video_ids, kept_V = [info.video_id for info in infos], np.concatenate(parts)
        url = storage.join(self.config.output, part_name(number))
        if self.source.kind == "features":
            write_features(url, self.source, kept_V, video_ids)
            return len(infos)
        places = [shards.span_of(sample) for sample in index.samples]
        videos = Videos(
            video_ids=video_ids,
            caption_ids=[[c.id for c in info.captions] for info in infos],
            captions=[[c.text for c in info.captions] for info in infos],
            keys=[sample.key for sample in index.samples],
            offsets=[offset for offset, _ in places],
            sizes=[size for _, size in places],
        )
        write_part(url, self.source, entry.name, kept_V, videos)
        return len(infos)

    def _batches(
        self, shard: str, tar: BinaryIO, samples: list[SampleIndex]
    ) -> Iterator[tuple[list[SampleInfo], Tensor]]:
        """Batches in the order of the shard. While one is encoded, the next is decoded in threads."""
        size = self.config.batch_size
        settings = eval_frames(self.loaded[0], self.source.views)
        with ThreadPoolExecutor(self.config.cpus_per_actor) as pool:
            ahead: deque[list[tuple[SampleInfo, Future[Tensor]]]] = deque()
            for start in range(0, len(samples), size):
                # Reading moves the tar's one file position, so it stays in this thread.
                ahead.append(
                    [
                        (
                            shards.read_info(tar, sample),
                            pool.submit(decode.decode_clip, shards.read_pictures(tar, sample), settings),
                        )
                        for sample in samples[start : start + size]
                    ]
                )
                if len(ahead) > 1:
                    yield _stack(shard, ahead.popleft())
            while ahead:
                yield _stack(shard, ahead.popleft())


def _stack(shard: str, batch: list[tuple[SampleInfo, Future[Tensor]]]) -> tuple[list[SampleInfo], Tensor]:
    frames = []
    for info, future in batch:
        try:
            frames.append(future.result())
        except DataError as error:
            raise DataError(f"{shard}, video {info.video_id}: {error}; the shard is damaged, build it again") from None
    return [info for info, _ in batch], torch.stack(frames)


def _check_finite(kept_B: Kept, infos_B: list[SampleInfo], shard: str) -> None:
    finite_B = np.isfinite(kept_B.reshape(len(kept_B), -1)).all(axis=1)
    if not finite_B.all():
        video = infos_B[int(np.argmin(finite_B))].video_id
        way_out = ", or need dtype=float32" if kept_B.dtype == np.float16 else ""
        raise DataError(
            f"{shard}, video {video}: its features are not finite; the run's best weights are unusable{way_out}"
        )
