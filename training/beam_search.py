"""Captions from the caption head, by beam search.

Shapes: B videos, F frames, W hypotheses of a caption, L tokens, D joint width, V vocabulary.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from training.config import CaptionConfig
from training.models import TwoTower

NextToken = Callable[[Tensor], Tensor]  # ids BWL → log-probabilities BWV of the token behind them
Found = tuple[list[list[int]], list[float]]  # sentences as ids without start and end, and their scores


@torch.inference_mode()
def write(towers: TwoTower, frames_BFD: Tensor, start: int, end: int, config: CaptionConfig) -> Found:
    """Captions of B videos.

    For each token the decoder runs over the whole sentence again: two layers over tens of tokens are little beside the
    image tower, which has run once.
    """
    captioner, clip = towers.captioner, towers.clip
    assert captioner is not None
    most = min(config.max_tokens, clip.context_length)

    def next_token(tokens_BWL: Tensor) -> Tensor:
        memory = frames_BFD.repeat_interleave(tokens_BWL.shape[1], 0)
        logits = captioner.head(captioner(clip, tokens_BWL.flatten(0, 1), memory)[:, -1])
        logs_BWV = logits.log_softmax(-1).unflatten(0, tokens_BWL.shape[:2])
        logs_BWV[..., start] = -torch.inf  # a small model may say so, but it is no word
        return logs_BWV

    starts_B = torch.full((len(frames_BFD),), start, device=frames_BFD.device)
    return beam_search(next_token, starts_B, end, config.model_copy(update={"max_tokens": most}))


def beam_search(next_token: NextToken, starts_B: Tensor, end: int, config: CaptionConfig) -> Found:
    """The best sentences found.

    After each token the `config.beams` best of all continuations are kept, those that have ended among them, by their
    log-probability / tokens ** length_penalty (start not counted, end counted). One beam is greedy decoding. At
    `config.max_tokens` a sentence has to end, so every score is that of a whole sentence under the model.
    """
    tokens_BWL = starts_B[:, None, None]
    sums_BW = torch.zeros(tokens_BWL.shape[:2], device=starts_B.device)
    lengths_BW = torch.zeros_like(sums_BW)
    is_over_BW = torch.zeros_like(sums_BW, dtype=torch.bool)
    for number in range(1, config.max_tokens):
        logs_BWV = next_token(tokens_BWL)
        ends_V = torch.arange(logs_BWV.shape[-1], device=logs_BWV.device) == end
        if number == config.max_tokens - 1:
            logs_BWV = logs_BWV.masked_fill(~ends_V, -torch.inf)
        # What has ended goes on as it is: one continuation, at no cost.
        logs_BWV = torch.where(is_over_BW[..., None], torch.where(ends_V, 0.0, -torch.inf), logs_BWV)
        lengths_BW = lengths_BW + ~is_over_BW
        sums_BWV = sums_BW[..., None] + logs_BWV
        scores_BX = (sums_BWV / lengths_BW[..., None] ** config.length_penalty).flatten(1)
        scores_BW, places_BW = scores_BX.topk(min(config.beams, scores_BX.shape[1]))
        parents_BW, words_BW = places_BW // len(ends_V), places_BW % len(ends_V)
        tokens_BWL = tokens_BWL.take_along_dim(parents_BW[..., None], 1)
        tokens_BWL = torch.cat([tokens_BWL, words_BW[..., None]], -1)
        lengths_BW, sums_BW = lengths_BW.gather(1, parents_BW), sums_BWV.flatten(1).gather(1, places_BW)
        is_over_BW = words_BW == end
        if is_over_BW.all():
            break
    ends_B = lengths_BW[:, 0].long().tolist()
    sentences = [ids_L[1:stop] for ids_L, stop in zip(tokens_BWL[:, 0].tolist(), ends_B, strict=True)]
    return sentences, scores_BW[:, 0].tolist()
