"""What is said of a model on a split: each number is a statistic of ranks, of one rank per query.

Shapes: Q queries, T texts, V videos, D joint width.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.errors import ConfigError
from common.shards import SampleInfo
from training.config import EvalConfig
from training.ranking import Ranking, Rows, Score, best_of_groups, cosines, dual_softmax, rank, reranked

Ranks = NDArray[np.float64]
Counts = NDArray[np.int64]
TIE = 1e-6
RECALLS = (1, 5, 10, 50)


class Features(NamedTuple):
    """Texts, or videos: what a score reads of them, and under a scorer the towers' unit vectors beside it."""

    read: Tensor
    vectors: Tensor | None = None


class Measured(NamedTuple):
    """The ranks of one kind of query, and what is said of them.

    `table` makes metrics by name from ranks and how often each is counted; `prefix` comes before the names. `videos_Q`
    is the video that a query is about: the queries of one video are no independent observations.
    """

    prefix: str
    table: Callable[[Ranks, Counts], dict[str, float]]
    ranks_Q: Ranks
    videos_Q: Counts

    def metrics(self, counts_Q: Counts | None = None) -> dict[str, float]:
        """Metrics by full name; `counts_Q`: how often a query is counted, None = each once."""
        counts_Q = np.ones(len(self.ranks_Q), np.int64) if counts_Q is None else counts_Q
        return {self.prefix + name: value for name, value in self.table(self.ranks_Q, counts_Q).items()}


class Evaluation(NamedTuple):
    """What is measured of a split, the same on every rank."""

    measured: list[Measured]
    by_text: Ranking
    infos: list[SampleInfo]

    @property
    def metrics(self) -> dict[str, float]:
        values = {name: value for part in self.measured for name, value in part.metrics().items()}
        return {**values, "num_videos": float(len(self.infos))}


def summary(ranks_Q: Ranks, counts_Q: Counts) -> dict[str, float]:
    """Recalls in percent, the ranks' median and mean, and rsum = R@1 + R@5 + R@10."""
    recalls = {f"r{k}": 100 * float(np.average(ranks_Q <= k, weights=counts_Q)) for k in RECALLS}
    order = ranks_Q.argsort(kind="stable")
    total_Q = counts_Q[order].cumsum()
    middle = np.searchsorted(total_Q, [(total_Q[-1] - 1) // 2, total_Q[-1] // 2], side="right")
    median, mean = ranks_Q[order][middle].mean(), np.average(ranks_Q, weights=counts_Q)
    rsum = recalls["r1"] + recalls["r5"] + recalls["r10"]
    return {**recalls, "mdr": float(median), "mnr": float(mean), "rsum": rsum}


def order_table(ranks_Q: Ranks, counts_Q: Counts) -> dict[str, float]:
    return {"order": 2 - float(np.average(ranks_Q, weights=counts_Q))}


def chance(num_videos: int) -> float:
    """R@1 in percent of a random order."""
    return 100 / num_videos


def retrieval(
    texts: Features, videos: Features, infos: Sequence[SampleInfo], config: EvalConfig, score: Score = cosines
) -> tuple[list[Measured], Ranking]:
    """Every caption ranks the videos, and every video the captions; what else `config` asks for. A collective.

    Args:
        texts: all captions, video by video; every video has at least one.
        videos: all videos, in the order of `infos`.
        score: of texts and videos as they are read, TV.

    Returns:
        The ranks, and the whole ranking by captions, in two stages if `config` asks for them; without a dual softmax.
    """
    num_texts, num_videos = len(texts.read), len(videos.read)
    scored = _rows(texts.read, videos.read, score)
    rankings = {"": scored}
    if config.rerank_top:
        assert texts.vectors is not None and videos.vectors is not None, "the config asks for a scorer"
        first = _rows(texts.vectors, videos.vectors, cosines)
        rankings = {"": _two_stages(first, texts.read, videos.read, score, config.rerank_top), "first_": first}
    if config.dsl_temperature:
        text_rows, video_rows = scored
        rankings["dsl_"] = (
            dual_softmax(text_rows, num_texts, num_videos, config.dsl_temperature),
            dual_softmax(video_rows, num_videos, num_texts, config.dsl_temperature),
        )
    owner_T = owners(infos)
    right_T, right_V = right_videos(infos, config.shared_captions)
    result, by_text = [], {}
    for prefix, (text_rows, video_rows) in rankings.items():
        by_text[prefix] = rank(text_rows, right_T, num_videos)
        # A video ranks the videos' groups of captions; a group's score is that of its best caption.
        by_video = rank(best_of_groups(video_rows, torch.as_tensor(owner_T), num_videos), right_V, num_texts)
        result.append(Measured(prefix, summary, by_text[prefix].ranks_Q, np.asarray(owner_T)))
        result.append(Measured(f"{prefix}v2t_", summary, by_video.ranks_Q, np.arange(num_videos)))
    return result, by_text[""]


def owners(infos: Sequence[SampleInfo]) -> list[int]:
    """Of every caption, video by video, its video."""
    return [v for v, info in enumerate(infos) for _ in info.captions]


def right_videos(infos: Sequence[SampleInfo], shared: bool) -> tuple[list[list[int]], list[list[int]]]:
    """Of every caption, the videos that it finds; of every video, the videos whose captions find it.

    Args:
        shared: a sentence finds all videos that have it, word for word; else a caption finds its own video alone.
    """
    own = [[v] for v in range(len(infos))]
    if not shared:
        return [own[v] for v in owners(infos)], own
    having = defaultdict(set)
    for v, info in enumerate(infos):
        for caption in info.captions:
            having[caption.text].add(v)
    found = {text: sorted(videos) for text, videos in having.items()}
    groups = [sorted(set().union(*(having[caption.text] for caption in info.captions))) for info in infos]
    return [found[caption.text] for info in infos for caption in info.captions], groups


def order(texts: Features, videos: Features, infos: Sequence[SampleInfo], score: Score = cosines) -> Measured:
    """Two-way choice between a clip and its twin (the other video of the same source), by a caption of the clip.

    Rank 1, 1.5 or 2 of the clip; scores within 1e-6 tie. A model that averages frames encoded one by one can't tell a
    clip from its reversal: its order score is 0.5.

    Raises:
        ConfigError: there are no twins.
    """
    members = defaultdict(list)
    for video, info in enumerate(infos):
        members[info.source_id].append(video)
    twin = {a: b for pair in members.values() if len(pair) == 2 for a, b in (pair, pair[::-1])}
    queries = [(t, v) for t, v in enumerate(owners(infos)) if v in twin]
    if not queries:
        raise ConfigError("eval.twins=true, but no source_id has exactly two videos: set eval.twins=false")
    pairs = [score(texts.read[t : t + 1], videos.read[[v, twin[v]]])[0] for t, v in queries]
    gap_Q = torch.stack(pairs).diff(dim=1)[:, 0]  # of the twin over the clip
    ranks_Q = torch.where(gap_Q.abs() <= TIE, 1.5, 1 + (gap_Q > 0).double())
    return Measured("", order_table, ranks_Q.numpy(), np.array([v for _, v in queries]))


def _rows(texts: Tensor, videos: Tensor, score: Score) -> tuple[Rows, Rows]:
    """What captions, and what videos, give to all others."""
    return lambda some: score(texts[some], videos), lambda some: score(texts, videos[some]).T


def _two_stages(first: tuple[Rows, Rows], texts: Tensor, videos: Tensor, score: Score, top: int) -> tuple[Rows, Rows]:
    return (
        reranked(first[0], lambda query, some: score(texts[query : query + 1], videos[some])[0], top),
        reranked(first[1], lambda query, some: score(texts[some], videos[query : query + 1])[:, 0], top),
    )
