"""The caption head of Prompt Switch (reference: official code, ICCV 2023): trained beside retrieval, never used in it.

What it says of a video is written by training/caption.py.

Shapes: B videos, F frames, L tokens, D text width (= joint width), V vocabulary, K counted positions of the batch.
"""

import torch
from torch import Tensor, nn

from training.models import clip as clip_tower


class Captioner(nn.Module):
    """A causal post-norm transformer decoder over word embeddings that attends to the frame features of a clip.

    Embeddings are the text tower's, without gradient, behind a LayerNorm of its own; the head starts as a copy of
    the token embedding, not tied to it. The memory is the frame features before their normalisation.
    """

    def __init__(self, clip: clip_tower.Clip, layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        table_VD = clip_tower.text_tower(clip).token_embedding.weight
        vocabulary, width = table_VD.shape
        heads = clip_tower.text_heads(clip)
        layer = nn.TransformerDecoderLayer(width, heads, 4 * width, dropout, batch_first=True)
        self.prenorm = nn.LayerNorm(width)
        self.decoder = nn.TransformerDecoder(layer, layers, nn.LayerNorm(width))
        self.head = nn.Linear(width, vocabulary)
        with torch.no_grad():
            self.head.weight.copy_(table_VD)
            self.head.bias.zero_()

    def forward(self, clip: clip_tower.Clip, tokens_BL: Tensor, frames_BFD: Tensor) -> Tensor:
        """Hidden states BLD; position j predicts token j+1."""
        with torch.no_grad():
            words_BLD = clip_tower.embed_words(clip, tokens_BL)
        mask_LL = nn.Transformer.generate_square_subsequent_mask(
            tokens_BL.shape[1], device=words_BLD.device, dtype=words_BLD.dtype
        )
        return self.decoder(self.prenorm(words_BLD), frames_BFD, tgt_mask=mask_LL, tgt_is_causal=True)


def counted_positions(tokens_BL: Tensor) -> Tensor:
    """True where input position j is a word or the start token, so that its target j+1 counts: B(L-1)."""
    positions = torch.arange(tokens_BL.shape[1] - 1, device=tokens_BL.device)
    return positions < (clip_tower.lengths(tokens_BL) - 1)[:, None]


def counted_rows(tokens_BL: Tensor) -> Tensor:
    """The counted positions' places in a flattened B(L-1), K."""
    return counted_positions(tokens_BL).flatten().nonzero().squeeze(1)
