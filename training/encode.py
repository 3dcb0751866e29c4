"""Encode a split over all ranks and score retrieval.

Shapes: B videos, T texts, V videos of the split, F frames, D joint width.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.shards import SampleInfo
from training import choices, metrics
from training.choices import Choices
from training.collectives import gather_objects, share
from training.config import EvalConfig
from training.data.loader import EvalBatch
from training.metrics import Evaluation, Features
from training.models import Retriever, VideoOut
from training.ranking import Score, cosines

Tokenize = Callable[[list[str]], Tensor]
TEXTS = 256  # sentences in a forward pass


class Split(NamedTuple):
    """A split as a model encodes it; the texts are the captions, video by video."""

    texts: Features
    videos: Features
    infos: list[SampleInfo]


def encode_clips(model: Retriever, frames_BFCHW: Tensor, views: int) -> Tensor:
    """What the model keeps of videos given as `views` clips each: unit vectors BD, or what its scorer reads."""
    return model.key(encode_views(model, frames_BFCHW, views))


def encode_views(model: Retriever, frames_BFCHW: Tensor, views: int) -> VideoOut:
    """Videos given as `views` clips each, view by view along F.

    Each view is a clip of its own to the encoder; the vector is pooled over the frames of all views, which is the
    official test protocol (12 frames through a 6-frame encoder) and a no-op for one view.
    """
    video = model.towers.encode_video(frames_BFCHW.unflatten(1, (views, -1)).flatten(0, 1))
    frames_BFD, alone_BFD = (x.unflatten(0, (-1, views)).flatten(1, 2) for x in (video.frames_BFD, video.alone_BFD))
    return VideoOut(normalize(model.towers.pooled(frames_BFD), dim=-1), frames_BFD, alone_BFD)


@torch.no_grad()
def evaluate(
    model: Retriever,
    batches: Iterable[EvalBatch],
    tokenize: Tokenize,
    config: EvalConfig,
    device: torch.device,
) -> dict[str, float]:
    """Metrics of a split whose videos are spread over the ranks. The same dict on every rank. A collective."""
    return evaluation(model, batches, tokenize, config, device).metrics


@torch.no_grad()
def evaluation(
    model: Retriever,
    batches: Iterable[EvalBatch],
    tokenize: Tokenize,
    config: EvalConfig,
    device: torch.device,
    asked: Choices | None = None,
    first: Split | None = None,
) -> Evaluation:
    """What `evaluate` sums up, query by query, and what else the videos are asked. A collective.

    Args:
        first: the same split by a two-tower model, whose vectors then find the candidates of `config.rerank_top`.
    """
    was_training = model.training
    model.eval()  # until the last score: a scorer has dropout too
    texts, videos, infos = encode_split(model, batches, tokenize, config.views, device)
    if first is not None:
        assert [info.video_id for info in first.infos] == [info.video_id for info in infos]
        texts, videos = texts._replace(vectors=first.texts.read), videos._replace(vectors=first.videos.read)
    found = measure(texts, videos, infos, config, model.score)
    if asked is not None and asked.sentences:
        features = encode_texts(model, asked.sentences, tokenize, device).read
        found.measured.extend(choices.measure(asked, features, videos.read, infos, model.score))
    model.train(was_training)
    return found


@torch.no_grad()
def encode_split(
    model: Retriever, batches: Iterable[EvalBatch], tokenize: Tokenize, views: int, device: torch.device
) -> Split:
    """The videos of all ranks, each once, and their captions, by a model in evaluation mode. A collective."""
    parts, infos = [], []
    for batch in batches:
        video = encode_views(model, batch.frames_BFCHW.to(device, non_blocking=True), views)
        parts.append(_kept(model, model.key(video), video.vector_BD))
        infos.extend(batch.videos)
    infos = [info for part in gather_objects(infos) for info in part]
    texts = encode_texts(model, [c.text for info in infos for c in info.captions], tokenize, device)
    return Split(texts, _gathered(parts), infos)


def encode_texts(model: Retriever, sentences: Sequence[str], tokenize: Tokenize, device: torch.device) -> Features:
    """Sentences, which every rank has, each encoded by one rank. A collective."""
    parts, mine = [], sentences[share(len(sentences))]
    for start in range(0, len(mine), TEXTS):
        text = model.towers.encode_text(tokenize(list(mine[start : start + TEXTS])).to(device))
        parts.append(_kept(model, model.query(text), text.vector_TD))
    return _gathered(parts)


def _kept(model: Retriever, read: Tensor, vectors: Tensor | None) -> Features:
    is_two_tower = model is model.towers
    return Features(read.float().cpu(), None if is_two_tower or vectors is None else vectors.float().cpu())


def _gathered(parts: list[Features]) -> Features:
    read, vectors = zip(*(part for of_rank in gather_objects(parts) for part in of_rank), strict=True)
    return Features(torch.cat(read), None if vectors[0] is None else torch.cat(vectors))


def measure(
    texts: Features, videos: Features, infos: list[SampleInfo], config: EvalConfig, of_pairs: Score = cosines
) -> Evaluation:
    """Ranks from what was encoded; `infos` are in the order of the videos, the texts their captions. A collective.

    Raises:
        RunError: the scores are not finite.
    """
    measured, by_text = metrics.retrieval(texts, videos, infos, config, of_pairs)
    if config.twins:
        measured.append(metrics.order(texts, videos, infos, of_pairs))
    return Evaluation(measured, by_text, infos)
