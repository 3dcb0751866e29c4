"""Losses of a batch that is spread over ranks.

Every loss is this rank's part of the global loss: the parts of all ranks add up to it, and every normaliser is the
global batch's. So the update is the same for any number of ranks. DDP averages gradients, therefore the caller
multiplies the objective by the number of ranks before `backward`.

Shapes: B videos of this rank, G of all ranks, D joint width, K counted caption positions, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from training.collectives import gather, rank, row_counts, sum_over_ranks
from training.config import LossConfig
from training.models.two_tower import Outputs

# The official code's list, with the start and end tokens added by `token_weights`.
FREQUENT_WORDS = (
    *("in", "on", "of", "to", "about", "this", "that", "a", "an", "the"),
    *("and", "there", "here", "is", "are", ".", ","),
)


def compute(outputs: Outputs, config: LossConfig, token_weights_V: Tensor | None) -> dict[str, Tensor]:
    """This rank's part of each weighted loss; their sum is the objective."""
    losses = {}
    if config.contrastive:
        assert outputs.video.vector_BD is not None
        part = contrastive(outputs.text.vector_TD, outputs.video.vector_BD, outputs.logit_scale)
        losses["contrastive"] = config.contrastive * part
    if config.caption:
        assert outputs.caption_logits_KV is not None and outputs.caption_targets_K is not None
        assert token_weights_V is not None
        part = caption(outputs.caption_logits_KV, outputs.caption_targets_K, token_weights_V)
        losses["caption"] = config.caption * part
    return losses


def contrastive(text_BD: Tensor, video_BD: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE: row b of text and of video are a pair; all other rows, of every rank, are negatives."""
    counts = row_counts(text_BD)
    texts_GD, videos_GD = gather(text_BD, counts), gather(video_BD, counts)
    labels_B = sum(counts[: rank()]) + torch.arange(len(text_BD), device=text_BD.device)
    to_video = cross_entropy(logit_scale * text_BD @ videos_GD.T, labels_B, reduction="sum")
    to_text = cross_entropy(logit_scale * video_BD @ texts_GD.T, labels_B, reduction="sum")
    return (to_video + to_text) / (2 * len(texts_GD))


def caption(logits_KV: Tensor, targets_K: Tensor, token_weights_V: Tensor) -> Tensor:
    """Weighted token cross-entropy, normalised by the sum of the targets' weights over all ranks."""
    weights_V = token_weights_V.to(logits_KV.dtype)
    total = sum_over_ranks(weights_V[targets_K].sum())
    return cross_entropy(logits_KV, targets_K, weight=weights_V, reduction="sum") / total


def token_weights(vocabulary: int, frequent_ids: list[int], weight: float) -> Tensor:
    """Class weights V of the caption loss: `weight` for frequent tokens (official default 0.25), 1 for the rest."""
    weights_V = torch.ones(vocabulary)
    weights_V[frequent_ids] = weight
    return weights_V
