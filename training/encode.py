"""Encode a split over all ranks and score retrieval.

Shapes: B videos, T texts, V videos of the split, F frames, D joint width.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from common.errors import RunError
from training import metrics
from training.collectives import gather_objects
from training.config import EvalConfig
from training.data.loader import EvalBatch
from training.metrics import Score, cosines
from training.models import Retriever, VideoOut


def encode_clips(model: Retriever, frames_BFCHW: Tensor, views: int) -> Tensor:
    """What the model keeps of videos given as `views` clips each: unit vectors BD, or what its scorer reads."""
    return model.key(encode_views(model, frames_BFCHW, views))


def encode_views(model: Retriever, frames_BFCHW: Tensor, views: int) -> VideoOut:
    """Videos given as `views` clips each, view by view along F.

    Each view is a clip of its own to the encoder; the vector is pooled over the frames of all views, which is the
    official test protocol (12 frames through a 6-frame encoder) and a no-op for one view.
    """
    clips = frames_BFCHW.unflatten(1, (views, -1)).flatten(0, 1)
    frames_BFD = model.towers.encode_video(clips).frames_BFD.unflatten(0, (-1, views)).flatten(1, 2)
    return VideoOut(normalize(model.towers.pooled(frames_BFD), dim=-1), frames_BFD)


@torch.no_grad()
def evaluate(
    model: Retriever,
    batches: Iterable[EvalBatch],
    tokenize: Callable[[list[str]], Tensor],
    config: EvalConfig,
    device: torch.device,
) -> dict[str, float]:
    """Metrics of a split whose videos are spread over the ranks. The same dict on every rank. A collective."""
    was_training = model.training
    model.eval()
    videos, texts, infos = [], [], []
    for batch in batches:
        videos.append(encode_clips(model, batch.frames_BFCHW.to(device, non_blocking=True), config.views).float().cpu())
        sentences = [c.text for info in batch.videos for c in info.captions]
        for start in range(0, len(sentences), 256):
            tokens_TL = tokenize(sentences[start : start + 256]).to(device)
            texts.append(model.query(model.towers.encode_text(tokens_TL)).float().cpu())
        infos.extend(batch.videos)
    parts = gather_objects((videos, texts, infos))
    videos, texts = [v for p in parts for v in p[0]], [t for p in parts for t in p[1]]
    scores = score(videos, texts, [i for p in parts for i in p[2]], config, model.score)
    model.train(was_training)
    return scores


def score(
    videos: list[Tensor], texts: list[Tensor], infos: list, config: EvalConfig, of_pairs: Score = cosines
) -> dict[str, float]:
    """Metrics from the keys and queries of all ranks; `infos` are the SampleInfos in the order of the videos."""
    text_TD, video_VD = torch.cat(texts), torch.cat(videos)
    if not (text_TD.isfinite().all() and video_VD.isfinite().all()):  # comparisons with NaN would rank all first
        raise RunError("the model's vectors are not finite, so nothing can be ranked: lower optim.lr")
    owner_T = [v for v, info in enumerate(infos) for _ in info.captions]
    sentences = [c.text for info in infos for c in info.captions]
    result = metrics.retrieval_metrics(text_TD, video_VD, sentences, owner_T, of_pairs)
    result["rsum"] = result["r1"] + result["r5"] + result["r10"]
    if config.twins:
        sources = [info.source_id for info in infos]
        result["order"] = metrics.order_score(text_TD, video_VD, owner_T, sources, of_pairs)
    result["num_videos"] = float(len(video_VD))
    return result
