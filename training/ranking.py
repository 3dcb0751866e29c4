"""Ranks of queries among items from their scores, some queries at a time: no queries x items matrix is ever held.

Rank of a query = 1 + wrong items that score higher + half of the wrong items that score the same: a model that
gives one score to everything gets the rank of chance, not rank 1. Several right items count as one: the best of them is
ranked against wrong items only. Every rank of a process group ranks an equal share of the queries.

Shapes: Q queries, N items that they rank, C queries of a chunk, K candidates, T texts, V videos, D joint width.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import RunError
from training import collectives

Score = Callable[[Tensor, Tensor], Tensor]  # what is kept of texts and of videos → scores TV
Rows = Callable[[slice], Tensor]  # some queries → their scores with all items, CN
CHUNK_SCORES = 64 * 2**20 // 4  # scores held at once: 64 MiB


def cosines(text_TD: Tensor, video_VD: Tensor) -> Tensor:
    """Scores TV of unit vectors."""
    return text_TD @ video_VD.T


class Ranking(NamedTuple):
    """Of every query: its rank, the best wrong item, and by how much the best right item scores more than that.

    In numpy, which Ray hands from a worker to the driver; it refuses tensors.
    """

    ranks_Q: NDArray[np.float64]
    rivals_Q: NDArray[np.int64]
    margins_Q: NDArray[np.float64]


def rank(rows: Rows, right: Sequence[Sequence[int]], num_items: int) -> Ranking:
    """Rank all queries. A collective; the same on every rank.

    Args:
        rows: their scores.
        right: of each query, the right items: at least one.

    Raises:
        RunError: a score is no number, and comparisons with it would rank the query first.
    """
    mine = [_ranked(rows(chunk), right[chunk]) for chunk in _chunks(len(right), num_items)]
    parts = [part for of_rank in collectives.gather_objects(mine) for part in of_rank]
    ranking = Ranking(*map(np.concatenate, zip(*parts, strict=True)))
    if np.isnan(ranking.margins_Q).any():
        raise RunError("the model's scores are not finite, so nothing can be ranked: lower optim.lr")
    return ranking


def best_of_groups(rows: Rows, group_N: Tensor, num_groups: int) -> Rows:
    """Scores of groups of items: each that of its best item. No group is empty."""

    def groups(queries: slice) -> Tensor:
        scores_CN = rows(queries)
        shape = (len(scores_CN), num_groups)
        lowest = scores_CN.new_full(shape, -torch.inf)
        return lowest.scatter_reduce(1, group_N.expand(len(scores_CN), -1), scores_CN, "amax")

    return groups


def dual_softmax(rows: Rows, num_queries: int, num_items: int, temperature: float) -> Rows:
    """Scores s times the softmax of s / temperature over all queries (CAMoE, arXiv 2109.04290, at inference).

    An item that many queries like counts for less. That reads every query before the first is answered, so it is a
    way to match two sets, not to search. A collective: a first pass sums each item's denominator.
    """
    sum_N = torch.full((num_items,), -torch.inf, dtype=torch.float64)  # its logarithm
    for chunk in _chunks(num_queries, num_items):
        sum_N = torch.logaddexp(sum_N, (rows(chunk).double() / temperature).logsumexp(0))
    sum_N = torch.stack(collectives.gather_objects(sum_N)).logsumexp(0)

    def weighted(queries: slice) -> Tensor:
        # In float64: exp(-2 / 0.01), the least share that cosines can have at CLIP's scale, is 0 in float32.
        scores_CN = rows(queries).double()
        return scores_CN * (scores_CN / temperature - sum_N).exp()

    return weighted


def reranked(first: Rows, second: Callable[[int, Tensor], Tensor], top: int) -> Rows:
    """Two stages: the first's best `top` items in the order of the second, all others behind in the first's order.

    Items that tie with the last of the best are scored again too, so that no order of the items decides who is.

    Args:
        second: a query and its candidates' indices K → their scores K.
    """

    def rows(queries: slice) -> Tensor:
        scores_CN = first(queries).to(torch.float64, copy=True)
        for query, scores_N in zip(range(queries.start, queries.stop), scores_CN, strict=True):
            border = scores_N.topk(min(top, len(scores_N))).values[-1]
            best_K = (scores_N >= border).nonzero()[:, 0]
            again_K = second(query, best_K).double()
            scores_N -= border - again_K.min() + 1  # the best of the others is more than 1 below the least
            scores_N[best_K] = again_K
        return scores_CN

    return rows


def _chunks(num_queries: int, num_items: int) -> Iterator[slice]:
    """This rank's share of the queries, as many at a time as CHUNK_SCORES holds."""
    mine = collectives.share(num_queries)
    size = max(1, CHUNK_SCORES // num_items)
    for start in range(mine.start, mine.stop, size):
        yield slice(start, min(start + size, mine.stop))


def _ranked(scores_CN: Tensor, right: Sequence[Sequence[int]]) -> Ranking:
    row = torch.as_tensor([row for row, items in enumerate(right) for _ in items])
    item = torch.as_tensor([item for items in right for item in items])
    lowest = scores_CN.new_tensor(-torch.inf)
    wrong_CN = scores_CN.index_put((row, item), lowest)
    right_CN = torch.full_like(scores_CN, -torch.inf).index_put((row, item), scores_CN[row, item])
    best_C1 = right_CN.amax(-1, keepdim=True)
    rivals = wrong_CN.max(-1)
    ranks_C = 1 + (wrong_CN > best_C1).sum(-1) + (wrong_CN == best_C1).sum(-1).double() / 2
    margins_C = (best_C1[:, 0] - rivals.values).double()
    return Ranking(ranks_C.numpy(), rivals.indices.numpy(), margins_C.numpy())
