"""What the methods need of a CLIP: the blocks of its two towers one by one, and how they are read out.

The towers are open_clip's own ViT and text transformer, or timm's image towers (timm_tower.py). An image's tokens come
first in its sequence; methods put theirs behind.

Shapes: N images, C channels, H height, W width (of images) or H heads of width d, L tokens, D width, T texts, E joint
width.
"""

import copy
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from training.models import timm_tower
from training.models.clip_weights import Clip, build_clip, clip_from_config
from training.models.open_clip_lib import (
    ResidualAttentionBlock,
    TextTransformer,
    TimmModel,
    VisionTransformer,
    open_clip,
)

__all__ = ["Clip", "ImageTower", "build_clip", "clip_from_config", "open_clip"]

ImageTower: TypeAlias = VisionTransformer | TimmModel
Hook = Callable[[Tensor], Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


# ---- image towers


def normalize_pixels(visual: ImageTower, frames: Tensor) -> Tensor:
    """uint8 (or already normalised float) ...CHW → float, with the tower's mean and standard deviation."""
    if frames.is_floating_point():
        return frames
    dtype = next(visual.parameters()).dtype
    mean = torch.tensor(getattr(visual, "image_mean", open_clip.OPENAI_DATASET_MEAN), dtype=dtype)
    std = torch.tensor(getattr(visual, "image_std", open_clip.OPENAI_DATASET_STD), dtype=dtype)
    # Without waiting for the device.
    scale_C11, shift_C11 = (
        v[:, None, None].to(frames.device, non_blocking=True) for v in (1 / (255 * std), mean / std)
    )
    return frames.to(dtype) * scale_C11 - shift_C11


def image_tokens(visual: ImageTower, pixels_NCHW: Tensor) -> Tensor:
    """[CLS, patches], or what the tower has of them, with positions, as they enter the first block: NLD."""
    if isinstance(visual, TimmModel):
        return timm_tower.image_tokens(visual.trunk, pixels_NCHW)
    return visual._embeds(pixels_NCHW)


def raw_image_tokens(visual: VisionTransformer, pixels_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """CLS 1D and patches NLD with positions, before the pre-LayerNorm."""
    patches_NLD = visual.conv1(pixels_NCHW).flatten(2).transpose(1, 2)
    positions_LD = visual.positional_embedding.to(patches_NLD.dtype)
    return visual.class_embedding.to(patches_NLD.dtype) + positions_LD[:1], patches_NLD + positions_LD[1:]


def pre_norm(visual: ImageTower, x: Tensor) -> Tensor:
    """The LayerNorm before the first block, if the tower has one."""
    return visual.trunk.norm_pre(x) if isinstance(visual, TimmModel) else visual.ln_pre(x)


def pooled(visual: ImageTower, x_NLD: Tensor) -> Tensor:
    """What carries each image behind the last block, ND: its CLS, or the pooling that the tower was trained with.

    Args:
        x_NLD: the image's own tokens only.
    """
    if isinstance(visual, TimmModel):
        return timm_tower.pooled(visual.trunk, x_NLD)
    if visual.pool_type == "tok":
        return x_NLD[:, 0]
    x_NLD = x_NLD if visual.final_ln_after_pool else visual.ln_post(x_NLD)
    return x_NLD[:, 1:].mean(dim=1)


def project(visual: ImageTower, x: Tensor) -> Tensor:
    """What carries an image → the joint space, with the last LayerNorm if it stands behind the pooling: ...D → ...E."""
    if isinstance(visual, TimmModel):
        return timm_tower.project(visual, x)
    is_normed = visual.pool_type == "avg" and not visual.final_ln_after_pool
    return (x if is_normed else visual.ln_post(x)) @ visual.proj


def image_width(visual: ImageTower) -> int:
    """D."""
    return int(visual.trunk.embed_dim if isinstance(visual, TimmModel) else visual.conv1.out_channels)


def tokens_per_image(visual: ImageTower) -> int:
    """L, without what a method adds."""
    if isinstance(visual, TimmModel):
        return int(visual.trunk.patch_embed.num_patches + visual.trunk.num_prefix_tokens)
    return len(visual.positional_embedding)


def vision_heads(visual: ImageTower) -> int:
    return int(_blocks(visual)[0].attn.num_heads)


# ---- blocks of either tower


def layers(tower: ImageTower | Clip) -> int:
    """The number of blocks of an image tower, or of a CLIP's text tower."""
    return len(_blocks(tower))


def run_block(
    tower: ImageTower | Clip,
    layer: int,
    x_NLD: Tensor,
    mix: Hook | None = None,
    *,
    shift: Hook | None = None,
    attend: Attend | None = None,
    mask: Tensor | None = None,
    images: int = 1,
) -> Tensor:
    """One pre-norm block of an image tower, or of a CLIP's text tower.

    Its activations are made again in the backward pass if the tower's `grad_checkpointing` is set.

    Args:
        mix: changes what the attention reads, after the first LayerNorm, and nothing else.
        shift: changes the residual stream itself, before the attention and again before the MLP.
        attend: computes the heads' outputs from their queries, keys and values, each NHLd; None = full attention.
            Of open_clip's own towers only.
        mask: added to the attention's logits, LL. Of open_clip's own towers only.
        images: how many images' tokens begin each sequence, one after the other.
    """
    is_timm = isinstance(tower, TimmModel)
    stack = tower.trunk if is_timm else _stack(tower)
    block, rotary = _blocks(tower)[layer], timm_tower.rotary(stack, x_NLD.shape[1], images) if is_timm else None
    if stack.grad_checkpointing and torch.is_grad_enabled():
        again: Tensor = checkpoint(_run_block, block, x_NLD, mix, shift, attend, mask, rotary, use_reentrant=False)
        return again
    return _run_block(block, x_NLD, mix, shift, attend, mask, rotary)


def _run_block(
    block: ResidualAttentionBlock | timm_tower.Block,
    x_NLD: Tensor,
    mix: Hook | None = None,
    shift: Hook | None = None,
    attend: Attend | None = None,
    mask: Tensor | None = None,
    rotary_LR: Tensor | None = None,
) -> Tensor:
    is_own = isinstance(block, ResidualAttentionBlock)
    x_NLD = x_NLD if shift is None else shift(x_NLD)
    y_NLD = block.ln_1(x_NLD) if is_own else block.norm1(x_NLD)
    y_NLD = y_NLD if mix is None else mix(y_NLD)
    if not is_own:
        y_NLD = timm_tower.attention(block, y_NLD, rotary_LR)
    elif attend is None:
        y_NLD = block.ls_1(block.attention(y_NLD, attn_mask=mask))
    else:
        y_NLD = block.ls_1(_attention(block.attn, y_NLD, attend))
    x_NLD = x_NLD + y_NLD
    x_NLD = x_NLD if shift is None else shift(x_NLD)
    return x_NLD + (block.ls_2(block.mlp(block.ln_2(x_NLD))) if is_own else timm_tower.mlp(block, x_NLD))


def _attention(attention: nn.MultiheadAttention, y_NLD: Tensor, attend: Attend) -> Tensor:
    """Self-attention with its own weights, whose pattern `attend` decides."""
    qkv_NLE = linear(y_NLD, attention.in_proj_weight, attention.in_proj_bias)
    q_NHLd, k_NHLd, v_NHLd = qkv_NLE.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attention.out_proj(attend(q_NHLd, k_NHLd, v_NHLd).transpose(1, 2).flatten(2))


def _stack(tower: VisionTransformer | Clip) -> nn.Module:
    """The open_clip transformer of an image tower, or of a CLIP's text tower."""
    return tower.transformer if isinstance(tower, VisionTransformer) else text_tower(tower).transformer


def _blocks(tower: ImageTower | Clip) -> Any:
    return tower.trunk.blocks if isinstance(tower, TimmModel) else _stack(tower).resblocks


class TextBlocks(nn.Module):
    """A copy of the first blocks of the text tower, to go on training over something else than words."""

    def __init__(self, clip: Clip, count: int, ln_eps: float) -> None:
        super().__init__()
        blocks = copy.deepcopy(_blocks(clip)[:count])
        for block in blocks:
            block.ln_1.eps = block.ln_2.eps = ln_eps
        self.resblocks = blocks
        self.requires_grad_(True)  # the original may be frozen

    def forward(self, x_NLD: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x_NLD = _run_block(block, x_NLD, mask=mask)
        return x_NLD


# ---- text towers


def text_tower(clip: Clip) -> TextTransformer | open_clip.CLIP:
    """What holds the text tower's parts: a CLIP its own ones, a CLIP with a custom text tower that one."""
    return getattr(clip, "text", clip)


def lengths(tokens_TL: Tensor) -> Tensor:
    """Ids up to and including the end token, T, of CLIP's tokenizer: the end token is its largest id."""
    return tokens_TL.argmax(dim=-1) + 1


def ends(clip: Clip, tokens_TL: Tensor) -> Tensor:
    """The slot that each sentence is read out of, T."""
    text = text_tower(clip)
    pool, end_id = (clip.text_pool_type, clip.text_eos_id) if text is clip else (text.pool_type, text.eos_id)
    if pool == "eos":
        return (tokens_TL == end_id).int().argmax(dim=-1)
    if pool in ("first", "last"):
        return tokens_TL.new_full((len(tokens_TL),), 0 if pool == "first" else tokens_TL.shape[1] - 1)
    return lengths(tokens_TL) - 1


def embed_words(clip: Clip, tokens_TL: Tensor) -> Tensor:
    """Token plus position embeddings, TLD."""
    text = text_tower(clip)
    return text.token_embedding(tokens_TL) + text.positional_embedding[: tokens_TL.shape[1]]


def encode_text(clip: Clip, tokens_TL: Tensor) -> tuple[Tensor, Tensor]:
    """Sentence vectors TE (not normalised) and word features TLE. L may be shorter than a causal tower's context.

    Equal to open_clip's `encode_text` on padded ids, because a causal tower's end token does not see the padding.
    """
    text, length = text_tower(clip), tokens_TL.shape[1]
    mask = text.attn_mask
    assert mask is not None or length == len(text.positional_embedding), "this text tower reads the padding"
    mask = None if mask is None else mask[:length, :length]
    x_TLD = text.transformer(embed_words(clip, tokens_TL), attn_mask=mask)
    return read_out(clip, x_TLD, ends(clip, tokens_TL))


def read_out(clip: Clip, x_TLD: Tensor, slots_T: Tensor) -> tuple[Tensor, Tensor]:
    """The text tower's last LayerNorm and projection: that of one slot of each sentence TE, and all TLE."""
    text = text_tower(clip)
    words_TLE, projection = text.ln_final(x_TLD), text.text_projection
    if projection is not None:
        words_TLE = projection(words_TLE) if isinstance(projection, nn.Linear) else words_TLE @ projection
    return words_TLE[torch.arange(len(x_TLD), device=x_TLD.device), slots_T], words_TLE


def joint_width(clip: Clip) -> int:
    """E."""
    projection = text_tower(clip).text_projection
    if projection is None:
        return int(text_tower(clip).token_embedding.embedding_dim)
    return int(projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1])


def text_heads(clip: Clip) -> int:
    return int(_blocks(clip)[0].attn.num_heads)
