"""X-Pool (Gorti et al., CVPR 2022, arXiv 2203.15086): a text attends to a video's frames and pools what it is about.

Trained: all of CLIP, and the pooling block at the new modules' rate. Cached per video: 2 F x D, the keys and values of
its frames, made of the F x D that `retrieval.embed` stores (2 F D^2). Multiply-adds per text-video pair: 2 F D +
2 D^2 + D (537 k at F = 12, D = 512).

Shapes: T texts, V videos, F frames, K = 2 F, D joint width, H heads of width d.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention

from training.model_config import XPoolConfig
from training.models import clip as clip_tower
from training.models.text_conditioned import Scorer


class XPool(Scorer):
    """Cross-attention with the text as its query, then a residual linear map, each with a LayerNorm behind it."""

    def __init__(self, config: XPoolConfig, clip: clip_tower.Clip, num_frames: int, num_words: int) -> None:
        super().__init__()
        width = clip_tower.joint_width(clip)
        self.cross_attn = CrossAttention(width, config.heads)
        self.linear_proj = _identity(width)
        self.layer_norm1, self.layer_norm2, self.layer_norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(config.dropout)

    def cached(self, key_VKD: Tensor) -> Tensor:
        return self.cross_attn.keys_and_values(self.layer_norm1(key_VKD))

    def pooled(self, text_TD: Tensor, cached_VKD: Tensor) -> Tensor:
        """A vector for every pair, VTD."""
        attended_VTD = self.layer_norm2(self.cross_attn(self.layer_norm1(text_TD), cached_VKD))
        return self.layer_norm3(attended_VTD + self.dropout(self.linear_proj(attended_VTD)))

    def pairs(self, query_TQD: Tensor, cached_VKD: Tensor) -> Tensor:
        text_TD = query_TQD[:, 0]
        pooled_VTD = normalize(self.pooled(text_TD, cached_VKD), dim=-1)
        return torch.einsum("td,vtd->tv", normalize(text_TD, dim=-1), pooled_VTD)

    def values_per_pair(self, query_TQD: Tensor, cached_VKD: Tensor) -> int:
        return 4 * query_TQD.shape[-1]


class CrossAttention(nn.Module):
    """All texts as queries of each video's frames. Maps begin as the identity (official)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (_identity(width) for _ in range(4))

    def keys_and_values(self, frames_VFD: Tensor) -> Tensor:
        """All keys of a video, then all values: VKD."""
        return torch.cat([self.k_proj(frames_VFD), self.v_proj(frames_VFD)], dim=1)

    def forward(self, text_TD: Tensor, cached_VKD: Tensor) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(-1, (self.heads, -1)).transpose(-3, -2)

        q_VHTd = split(self.q_proj(text_TD)).expand(len(cached_VKD), -1, -1, -1)
        k_VHFd, v_VHFd = (split(part_VFD) for part_VFD in cached_VKD.chunk(2, dim=1))
        return self.out_proj(scaled_dot_product_attention(q_VHTd, k_VHFd, v_VHFd).transpose(1, 2).flatten(2))


def _identity(width: int) -> nn.Linear:
    layer = nn.Linear(width, width)
    nn.init.eye_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
