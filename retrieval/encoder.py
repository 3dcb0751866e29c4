"""A run's two towers at work: sentences → vectors, and shards → parts of an embeddings folder. Free of Ray.

Shapes: B videos of a batch, F frames, T texts, V videos of a shard, D joint width.
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
from retrieval.embeddings import Source, Videos, part_name, write_part
from training import models
from training.config import TrainConfig
from training.data import decode
from training.data.cache import ShardCache
from training.data.loader import eval_frames
from training.encode import encode_clips
from training.models import TwoTower
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


class Embedder:
    """Encodes shards of one dataset. It loads its model when it is first used, so it may be rebuilt at any time."""

    def __init__(self, config: EmbedConfig, source: Source, device: str) -> None:
        self.config, self.source, self.device = config, source, device
        self.cache = ShardCache(source.dataset, source.dataset_sha256, config.cache, config.cache_bytes)

    @functools.cached_property
    def loaded(self) -> tuple[TrainConfig, TwoTower]:
        run = self.source.run
        config, model = load_two_tower(run)
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
        vectors_VD = np.zeros((0, self.source.dimension), np.float32)
        infos: list[SampleInfo] = []
        for infos_B, frames_BFCHW in self._batches(entry.name, tar, index.samples):
            with torch.inference_mode():
                vectors_BD = encode_clips(model, frames_BFCHW.to(self.device), self.source.views).float().cpu().numpy()
            _check_finite(vectors_BD, infos_B, entry.name)
            vectors_VD = np.concatenate([vectors_VD, vectors_BD])
            infos += infos_B
        places = [shards.span_of(sample) for sample in index.samples]
        videos = Videos(
            video_ids=[info.video_id for info in infos],
            caption_ids=[[c.id for c in info.captions] for info in infos],
            captions=[[c.text for c in info.captions] for info in infos],
            keys=[sample.key for sample in index.samples],
            offsets=[offset for offset, _ in places],
            sizes=[size for _, size in places],
        )
        write_part(storage.join(self.config.output, part_name(number)), self.source, entry.name, vectors_VD, videos)
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


def _check_finite(vectors_BD: NDArray[np.float32], infos_B: list[SampleInfo], shard: str) -> None:
    finite_B = np.isfinite(vectors_BD).all(axis=1)
    if not finite_B.all():
        video = infos_B[int(np.argmin(finite_B))].video_id
        raise DataError(f"{shard}, video {video}: its vector is not finite; the run's best weights are unusable")
