"""Retrieval metrics from vectors, chunked: no texts x videos matrix is ever held.

Rank of a query = 1 + wrong items that score higher + half of the wrong items that score the same: a model that
gives one score to everything gets the rank of chance, not rank 1. Several right answers (a video's captions; videos
that share a sentence word for word) count as one: the best of them is ranked against wrong items only.

Shapes: T texts, V videos, D joint width, C texts or videos of a chunk.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError

Score = Callable[[Tensor, Tensor], Tensor]
TIE = 1e-6
CHUNK_SCORES = 64 * 2**20 // 4  # scores held at once: 64 MiB


def cosines(text_TD: Tensor, video_VD: Tensor) -> Tensor:
    """Scores TV of unit vectors."""
    return text_TD @ video_VD.T


def retrieval_metrics(
    text_TD: Tensor, video_VD: Tensor, texts: Sequence[str], owner_T: Sequence[int], score: Score = cosines
) -> dict[str, float]:
    """R@1/5/10 (percent), median and mean rank, text→video, and video→text with the prefix `v2t_`.

    Args:
        text_TD: unit vectors of all captions.
        video_VD: unit vectors of all videos.
        texts: the captions; equal sentences are right answers for each other's videos.
        owner_T: which video each caption belongs to. Every video has at least one.
        score: of all given texts and videos, TV. For other than cosines they may be features of any shape.
    """
    owner = torch.as_tensor(owner_T)
    right = _right_videos(texts, owner_T)
    names = {
        "": _text_ranks(text_TD, video_VD, right, score),
        "v2t_": _video_ranks(text_TD, video_VD, owner, right, score),
    }
    return {prefix + name: value for prefix, ranks in names.items() for name, value in summary(ranks).items()}


def summary(ranks: Tensor) -> dict[str, float]:
    """Recalls in percent, and the ranks' median and mean."""
    recalls = {f"r{k}": 100 * float((ranks <= k).double().mean()) for k in (1, 5, 10)}
    return {**recalls, "mdr": float(ranks.double().quantile(0.5)), "mnr": float(ranks.double().mean())}


def order_score(
    text_TD: Tensor, video_VD: Tensor, owner_T: Sequence[int], sources: Sequence[str], score: Score = cosines
) -> float:
    """Two-way choice between a clip and its twin (the other video of the same source), by a caption of the clip.

    Mean over (caption, clip, twin) of 1 if the clip scores higher, 0.5 within 1e-6, else 0. A model that averages
    frames encoded one by one can't tell a clip from its reversal: it gets 0.5.
    """
    members = defaultdict(list)
    for video, source in enumerate(sources):
        members[source].append(video)
    twin = {a: b for pair in members.values() if len(pair) == 2 for a, b in (pair, pair[::-1])}
    texts = [t for t, video in enumerate(owner_T) if video in twin]
    if not texts:
        raise ConfigError("eval.twins=true, but no source_id has exactly two videos: set eval.twins=false")
    own = torch.as_tensor([owner_T[t] for t in texts])
    other = torch.as_tensor([twin[int(v)] for v in own])
    step, gaps = max(1, CHUNK_SCORES // len(video_VD)), []
    for start in range(0, len(texts), step):
        chunk = slice(start, start + step)
        scores_CV = score(text_TD[texts[chunk]], video_VD)
        rows = torch.arange(len(scores_CV))
        gaps.append(scores_CV[rows, own[chunk]] - scores_CV[rows, other[chunk]])
    gap_T = torch.cat(gaps)
    return float(torch.where(gap_T.abs() <= TIE, 0.5, (gap_T > 0).double()).mean())


def chance(num_videos: int) -> float:
    """R@1 in percent of a random order."""
    return 100 / num_videos


def _right_videos(texts: Sequence[str], owner_T: Sequence[int]) -> list[list[int]]:
    """Per text, the videos that have this very sentence."""
    videos: dict[str, set[int]] = defaultdict(set)
    for text, video in zip(texts, owner_T, strict=True):
        videos[text].add(int(video))
    return [sorted(videos[text]) for text in texts]


def _text_ranks(text_TD: Tensor, video_VD: Tensor, right: list[list[int]], score: Score) -> Tensor:
    ranks = []
    step = max(1, CHUNK_SCORES // len(video_VD))
    for start in range(0, len(text_TD), step):
        scores_CV = score(text_TD[start : start + step], video_VD)
        ranks.append(_ranks(scores_CV, right[start : start + step]))
    return torch.cat(ranks)


def _video_ranks(text_TD: Tensor, video_VD: Tensor, owner_T: Tensor, right: list[list[int]], score: Score) -> Tensor:
    """A video ranks the videos' caption groups; a group's score is that of its best caption."""
    also: dict[int, set[int]] = defaultdict(set)
    for videos in right:
        for video in videos:
            also[video].update(videos)
    groups = [sorted(also[v]) for v in range(len(video_VD))]
    by_owner = torch.argsort(owner_T, stable=True)
    starts = torch.searchsorted(owner_T[by_owner], torch.arange(len(video_VD)))
    sorted_TD = text_TD[by_owner]
    ranks = []
    step = max(1, CHUNK_SCORES // len(text_TD))
    for start in range(0, len(video_VD), step):
        scores_CT = score(sorted_TD, video_VD[start : start + step]).T
        groups_CV = torch.from_numpy(np.maximum.reduceat(scores_CT.numpy(), starts.numpy(), axis=1))
        ranks.append(_ranks(groups_CV, groups[start : start + step]))
    return torch.cat(ranks)


def _ranks(scores_CV: Tensor, right: list[list[int]]) -> Tensor:
    """Rank of each row's best right column among the wrong ones."""
    rows = torch.as_tensor([row for row, columns in enumerate(right) for _ in columns])
    columns = torch.as_tensor([column for columns in right for column in columns])
    wrong_CV = scores_CV.index_put((rows, columns), scores_CV.new_tensor(-torch.inf))
    right_CV = torch.full_like(scores_CV, -torch.inf).index_put((rows, columns), scores_CV[rows, columns])
    best_C1 = right_CV.amax(-1, keepdim=True)
    return 1 + (wrong_CV > best_C1).sum(-1) + (wrong_CV == best_C1).sum(-1) / 2
