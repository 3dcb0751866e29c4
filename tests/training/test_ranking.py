"""Ranks from scores, shared by the ranks of a process group."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.training.test_metrics import infos_of
from training import collectives, ranking
from training.config import EvalConfig
from training.metrics import Features, retrieval


def everything() -> dict[str, list[float]]:
    """All ranks that `retrieval` gives of a split, by prefix; its first stage has vectors of its own."""
    generator = torch.Generator().manual_seed(0)
    infos = infos_of([[f"{v} {n}" for n in range(count)] for v, count in enumerate([2, 1, 2, 1, 1, 2, 1])])
    texts, videos = (Features(*(torch.randn(size, 4, generator=generator) for _ in range(2))) for size in (10, 7))
    found = {}
    for config in (EvalConfig(dsl_temperature=0.5), EvalConfig(rerank_top=3)):
        for part in retrieval(texts, videos, infos, config)[0]:
            found[f"{config.rerank_top} {part.prefix}"] = part.ranks_Q.tolist()
    return found


def as_ranks(world_size: int, work: Callable[[], object]) -> list[object]:
    """What each of several ranks gets; they are threads, with collectives that meet at a barrier."""
    barrier, slots, own = threading.Barrier(world_size, timeout=60), [None] * world_size, threading.local()

    def gather_objects(item: object) -> list[object]:
        slots[own.rank] = item
        barrier.wait()
        items = list(slots)
        barrier.wait()
        return items

    def run(rank: int) -> object:
        own.rank = rank
        return work()

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(world_size) as pool:
        patch.setattr(collectives, "rank", lambda: own.rank)
        patch.setattr(collectives, "world_size", lambda: world_size)
        patch.setattr(collectives, "gather_objects", gather_objects)
        return list(pool.map(run, range(world_size)))


@pytest.mark.parametrize("world_size", [2, 3, 13])
def test_ranks_share_the_queries_and_all_get_the_whole(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are more of them than queries.

    Seen to fail where a rank's part of the dual softmax's first pass is left out, and where every rank ranks all.
    """
    monkeypatch.setattr(ranking, "CHUNK_SCORES", 14)  # two texts at a time
    expected = everything()
    assert len(expected) == 8 and {len(ranks) for ranks in expected.values()} == {7, 10}
    assert as_ranks(world_size, everything) == [expected] * world_size
