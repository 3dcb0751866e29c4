"""The order of samples: a pure function of (shard sizes, seed, epoch), the same for every number of ranks.

An epoch concatenates the shards in a seeded order and shuffles the samples inside blocks of shards, so a node touches
few shards at a time. Positions are dealt to L lanes in L runs of n = N // L; a global batch takes an equal share from
every lane, and a rank takes whole lanes. So the set of samples in a global batch does not depend on the number of
ranks, and a position is nothing but a step number. A video is one sample, hence never twice in a batch.
"""

import functools
import logging

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError

log = logging.getLogger(__name__)


class SampleOrder:
    """Which samples each rank reads at each step.

    Args:
        shard_sizes: samples per shard.
        batch_size: samples per step over all ranks.
        lanes: the most ranks; lowered to a divisor of `batch_size`.
        shuffle_shards: shards per shuffled block.

    Raises:
        ConfigError: there are fewer samples than one batch.
    """

    def __init__(self, shard_sizes: list[int], batch_size: int, lanes: int, shuffle_shards: int, seed: int) -> None:
        self.shard_sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(self.shard_sizes.sum())
        if self.num_samples < batch_size:
            raise ConfigError(
                f"optim.batch_size={batch_size} is more than the {self.num_samples} training videos: "
                f"set optim.batch_size={self.num_samples} or less"
            )
        self.lanes = next(n for n in range(min(lanes, batch_size), 0, -1) if batch_size % n == 0)
        if self.lanes != lanes:
            log.info("data.lanes lowered from %d to %d, a divisor of the batch size %d", lanes, self.lanes, batch_size)
        self.share = batch_size // self.lanes
        self.lane_length = self.num_samples // self.lanes
        self.steps_per_epoch = self.lane_length // self.share
        self.shuffle_shards, self.seed = shuffle_shards, seed

    def batch(self, step: int, rank: int, world_size: int) -> list[tuple[int, int, int]]:
        """The (epoch, shard, row) that `rank` reads at global step `step`."""
        epoch, within = divmod(step, self.steps_per_epoch)
        lanes = np.arange(*self.rank_lanes(rank, world_size))
        offsets = within * self.share + np.arange(self.share)
        samples = self._epoch(epoch)[(lanes[:, None] * self.lane_length + offsets).ravel()]
        starts = np.cumsum(self.shard_sizes) - self.shard_sizes
        shards = np.searchsorted(starts, samples, side="right") - 1
        return [(epoch, int(s), int(i - starts[s])) for s, i in zip(shards, samples, strict=True)]

    def rank_lanes(self, rank: int, world_size: int) -> tuple[int, int]:
        """First lane of a rank and of the next one. Lanes that don't divide evenly make some ranks' batches larger."""
        if world_size > self.lanes:
            raise ConfigError(f"{world_size} ranks are more than data.lanes={self.lanes}: raise it or use fewer ranks")
        return rank * self.lanes // world_size, (rank + 1) * self.lanes // world_size

    def counts(self, world_size: int) -> list[int]:
        """Samples of each rank in every global batch."""
        lanes = [self.rank_lanes(rank, world_size) for rank in range(world_size)]
        return [(last - first) * self.share for first, last in lanes]

    @functools.lru_cache(maxsize=2)  # noqa: B019 (one order lives as long as its process)
    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        """The global sample numbers of an epoch in its order; 80 MB for 10 M samples."""
        random = np.random.default_rng([self.seed, epoch])
        starts = np.cumsum(self.shard_sizes) - self.shard_sizes
        shards = random.permutation(len(self.shard_sizes))
        blocks = []
        for first in range(0, len(shards), self.shuffle_shards):
            block = shards[first : first + self.shuffle_shards]
            blocks.append(
                random.permutation(
                    np.concatenate([np.arange(starts[s], starts[s] + self.shard_sizes[s]) for s in block])
                )
            )
        return np.concatenate(blocks)


def caption_turn(num_captions: int, epoch: int, seed: int, video: int) -> int:
    """Which caption a video shows in an epoch: a seeded permutation, so `num_captions` epochs show each once."""
    order = np.random.default_rng([seed, video]).permutation(num_captions)
    return int(order[epoch % num_captions])
