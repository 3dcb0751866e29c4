"""The order of samples: complete, without repeats, and the same for every number of ranks.

Seen to fail with one order for all epochs, one that no seed repeats, and ranks that share out whole lanes evenly.
"""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError
from training.data.plan import SampleOrder, caption_turn

SIZES = st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) >= 24)


def order(sizes: list[int], batch: int = 24, lanes: int = 8, block: int = 3, seed: int = 0) -> SampleOrder:
    return SampleOrder(sizes, batch, lanes, block, seed)


@given(SIZES, st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_shows_every_sample_at_most_once_and_drops_less_than_a_batch_and_lanes(sizes, block, epoch):
    plan = order(sizes, block=block)
    first = epoch * plan.steps_per_epoch
    seen = [item for step in range(first, first + plan.steps_per_epoch) for item in plan.batch(step, 0, 1)]
    assert {e for e, _, _ in seen} == {epoch}
    assert len(set(seen)) == len(seen)
    assert all(row < sizes[shard] for _, shard, row in seen)
    assert sum(sizes) - len(seen) < plan.lanes + 24


@given(SIZES, st.integers(1, 8), st.integers(0, 40))
def test_the_set_of_a_global_batch_is_the_same_for_every_number_of_ranks(sizes, world_size, step):
    plan = order(sizes)
    parts = [plan.batch(step, rank, world_size) for rank in range(world_size)]
    together = [item for part in parts for item in part]
    assert len(together) == 24 == len(set(together))
    assert set(together) == set(plan.batch(step, 0, 1))
    assert all(parts)  # no rank is without work


def test_epochs_and_seeds_differ_and_repeat_exactly():
    plan, again, other = order([50] * 4), order([50] * 4), order([50] * 4, seed=1)
    assert plan.batch(0, 0, 1) == again.batch(0, 0, 1)
    assert plan.batch(0, 0, 1) != other.batch(0, 0, 1)
    rows = [[i[1:] for i in plan.batch(s, 0, 1)] for s in (0, plan.steps_per_epoch)]
    assert rows[0] != rows[1]


def test_a_block_of_shards_bounds_how_many_are_open():
    plan = order([100] * 20, batch=10, lanes=1, block=2)
    for first in range(0, plan.steps_per_epoch, 20):
        assert len({s for step in range(first, first + 20) for _, s, _ in plan.batch(step, 0, 1)}) == 2


def test_too_few_samples_and_too_many_ranks_are_one_sentence():
    with pytest.raises(ConfigError, match=r"optim.batch_size=24 is more than the 10 training videos"):
        order([10])
    with pytest.raises(ConfigError, match=r"9 ranks are more than data.lanes=8"):
        order([100]).batch(0, 0, 9)


def test_lanes_fall_to_a_divisor_of_the_batch():
    assert order([100], batch=12, lanes=64).lanes == 12
    assert order([100], batch=10, lanes=4).lanes == 2


@given(st.integers(1, 20), st.integers(0, 100), st.integers(0, 2**40))
def test_every_caption_has_its_turn_once_per_cycle(captions, seed, video):
    turns = [caption_turn(captions, epoch, seed, video) for epoch in range(2 * captions)]
    assert sorted(turns[:captions]) == list(range(captions))
    assert turns[:captions] == turns[captions:]


def test_ten_million_samples_are_ordered_in_memory_that_a_worker_has():
    plan = order([500] * 20_000, batch=1024, lanes=64)
    assert plan._epoch(0).nbytes == 80_000_000
    assert len(np.unique(plan._epoch(0)[:1000])) == 1000
