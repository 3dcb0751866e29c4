"""timm's image towers as clip.py needs them: ViT (SigLIP, MobileCLIP, ViTamin) and EVA (EVA-CLIP, Perception Encoder).

Shapes: N images, C channels, H height, W width, L tokens, D width, E joint width, R values of a rotary position.
"""

from typing import TypeAlias

import torch
from torch import Tensor

from training.models.open_clip_lib import Eva, EvaBlock, TimmBlock, TimmModel, TimmViT

Trunk: TypeAlias = TimmViT | Eva
Block: TypeAlias = TimmBlock | EvaBlock


def image_tokens(trunk: Trunk, pixels_NCHW: Tensor) -> Tensor:
    """[CLS, registers, patches], as many of the first two as there are, before the first block: NLD."""
    tokens = trunk._pos_embed(trunk.patch_embed(pixels_NCHW))
    return trunk.norm_pre(tokens[0] if isinstance(trunk, Eva) else tokens)


def rotary(trunk: Trunk, length: int, images: int) -> Tensor | None:
    """The sines and cosines that turn each token but the first prefix, by its place in its image; None without rotary.

    What stands behind the images' own tokens has no place: it is turned by nothing.
    """
    if getattr(trunk, "rope", None) is None:
        return None
    patches_PR, prefix = trunk.rope.get_embed(), trunk.num_prefix_tokens
    sine_1R = patches_PR.new_zeros(1, patches_PR.shape[1] // 2)
    unturned_1R = torch.cat([sine_1R, sine_1R + 1], dim=-1)
    image_LR = torch.cat([unturned_1R.expand(prefix, -1), patches_PR])
    behind = length - images * len(image_LR)
    return torch.cat([image_LR.repeat(images, 1), unturned_1R.expand(behind, -1)])[prefix:]


def attention(block: Block, y_NLD: Tensor, rotary_LR: Tensor | None) -> Tensor:
    """What a block's attention adds to the residual stream."""
    if isinstance(block, TimmBlock):
        return block.drop_path1(block.ls1(block.attn(y_NLD)))
    y_NLD = block.attn(y_NLD, rope=rotary_LR)
    return block.drop_path1(y_NLD if block.gamma_1 is None else block.gamma_1 * y_NLD)


def mlp(block: Block, x_NLD: Tensor) -> Tensor:
    """What a block's MLP adds to the residual stream."""
    y_NLD = block.mlp(block.norm2(x_NLD))
    if isinstance(block, TimmBlock):
        return block.drop_path2(block.ls2(y_NLD))
    return block.drop_path2(y_NLD if block.gamma_2 is None else block.gamma_2 * y_NLD)


def pooled(trunk: Trunk, x_NLD: Tensor) -> Tensor:
    """What carries each image, ND: CLS as it is, or what is pooled over the normalised tokens."""
    return x_NLD[:, 0] if reads_cls(trunk) else trunk.pool(trunk.norm(x_NLD))


def project(tower: TimmModel, x: Tensor) -> Tensor:
    """What carries an image → the joint space, ...D → ...E."""
    trunk = tower.trunk
    x = trunk.norm(x) if reads_cls(trunk) else x
    return tower.head(trunk.head(trunk.head_drop(trunk.fc_norm(x))))


def reads_cls(trunk: Trunk) -> bool:
    return trunk.attn_pool is None and trunk.global_pool == "token"
