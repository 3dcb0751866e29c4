"""Losses of a batch that is spread over ranks.

Every loss is this rank's part of the global loss: the parts of all ranks add up to it, and every normaliser is the
global batch's. So the update is the same for any number of ranks. DDP averages gradients, therefore the caller
multiplies the objective by the number of ranks before `backward`.

Shapes: B videos of this rank, G of all ranks, F frames, X = F*B, D joint width, K counted caption positions,
V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from training.collectives import gather, rank, sum_over_ranks
from training.models.captioner import counted_positions
from training.models.two_tower import Outputs
from training.ranking import Score, cosines

# The official code's list, with the start and end tokens added by `frequent_ids`.
FREQUENT_WORDS = (
    *("in", "on", "of", "to", "about", "this", "that", "a", "an", "the"),
    *("and", "there", "here", "is", "are", ".", ","),
)


def contrastive(
    text_BD: Tensor,
    video_BD: Tensor,
    logit_scale: Tensor,
    counts: list[int],
    score: Score = cosines,
) -> Tensor:
    """Symmetric InfoNCE: row b of text and of video are a pair; all other rows, of every rank, are negatives.

    Args:
        counts: rows of each rank.
        score: of all given texts and videos, TV; for other than cosines the rows may be features of any shape.
    """
    texts_GD, videos_GD = gather(text_BD, counts), gather(video_BD, counts)
    labels_B = sum(counts[: rank()]) + torch.arange(len(text_BD), device=text_BD.device)
    scores_BG = score(text_BD, videos_GD)
    # Alone, both are the same pairs.
    scores_GB = scores_BG if len(texts_GD) == len(text_BD) else score(texts_GD, video_BD)
    to_video = cross_entropy(logit_scale * scores_BG, labels_B, reduction="sum")
    to_text = cross_entropy(logit_scale * scores_GB.T, labels_B, reduction="sum")
    return (to_video + to_text) / (2 * len(texts_GD))


def frame_contrastive(text_BD: Tensor, frames_BFD: Tensor, logit_scale: Tensor, counts: list[int]) -> Tensor:
    """The same with each frame in its video's place, mean over the frames: a caption has to fit every single one."""
    frames_BFD = normalize(frames_BFD, dim=-1)
    texts_GD, frames_GFD = gather(text_BD, counts), gather(frames_BFD, counts)
    labels_B = sum(counts[: rank()]) + torch.arange(len(text_BD), device=text_BD.device)
    count = frames_BFD.shape[1]
    labels_X = labels_B.repeat(count)
    to_video = logit_scale * torch.einsum("bd,gfd->fbg", text_BD, frames_GFD).flatten(0, 1)
    to_text = logit_scale * torch.einsum("bfd,gd->fbg", frames_BFD, texts_GD).flatten(0, 1)
    total = cross_entropy(to_video, labels_X, reduction="sum") + cross_entropy(to_text, labels_X, reduction="sum")
    return total / (2 * count * len(texts_GD))


def caption_total(tokens_BL: Tensor, token_weights_V: Tensor) -> Tensor:
    """The sum of the weights of all target tokens of the global batch. A collective."""
    # A product, not a selection: a selection's size is only known after a look at the device.
    return sum_over_ranks((token_weights_V[tokens_BL[:, 1:]] * counted_positions(tokens_BL)).sum())


def caption(outputs: Outputs, token_weights_V: Tensor, total: Tensor) -> Tensor:
    """Weighted token cross-entropy of a piece of the batch, normalised by the global batch's `caption_total`."""
    assert outputs.caption_logits_KV is not None and outputs.caption_targets_K is not None
    logits_KV = outputs.caption_logits_KV
    logits_KV = logits_KV.float() if logits_KV.dtype.itemsize < 4 else logits_KV
    weights_V = token_weights_V.to(logits_KV.dtype)
    return cross_entropy(logits_KV, outputs.caption_targets_K, weight=weights_V, reduction="sum") / total


def token_weights(vocabulary: int, frequent_ids: list[int], weight: float) -> Tensor:
    """Class weights V of the caption loss: `weight` for frequent tokens (official default 0.25), 1 for the rest."""
    weights_V = torch.ones(vocabulary)
    weights_V[frequent_ids] = weight
    return weights_V
