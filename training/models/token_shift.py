"""Token shift: a part of each frame's tokens is taken from the frames beside it. No parameters, no multiply-adds.

    cls      TokShift (Zhang et al., ACM MM 2021, arXiv 2108.02432): some channels of the CLS token, in the residual
             stream, before the attention and again before the MLP of every layer; zeros come in at the clip's ends
    patches  TS2-Net's (Liu et al., ECCV 2022, arXiv 2207.07852): whole patch tokens, in what the attention of the last
             two layers reads; the first and last frame keep their own

Prompt Switch compares itself with a token shift, probably TS2-Net's, as that is what it names beside it.

Trained: all of CLIP. Cached per video: one D vector. Multiply-adds per text-video pair: D.

Shapes: B videos, F frames, N = B*F images, L tokens of an image, CLS first, C channels, D joint width.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from common.errors import ConfigError
from training.model_config import ShiftConfig
from training.models import clip as clip_tower
from training.models.clip import Hook
from training.models.two_tower import TwoTower


class TokenShift(TwoTower):
    """CLIP's image tower with a shift between frames.

    Raises:
        ConfigError: the backbone has fewer layers or patches than the shift needs.
    """

    def __init__(self, config: ShiftConfig, clip: clip_tower.Clip | None = None) -> None:
        super().__init__(config, clip)
        self.kind, self.div, self.frames_are_unit = config.shift, config.div, config.unit_frames
        layers, tokens = clip_tower.layers(self.clip.visual), clip_tower.tokens_per_image(self.clip.visual)
        self.first = 0 if config.last_layers is None else layers - config.last_layers
        if self.first < 0:
            raise ConfigError(
                f"model.last_layers={config.last_layers} is more than {config.backbone}'s {layers} layers"
            )
        if config.shift == "patches" and tokens < config.div:
            raise ConfigError(f"model.div={config.div} is more than the {tokens} image tokens of {config.backbone}")

    def frame_features(self, pixels_BFCHW: Tensor) -> Tensor:
        return clip_tower.project(self.clip.visual, self.tokens(pixels_BFCHW)[:, :, 0])

    def tokens(self, pixels_BFCHW: Tensor, layers: int | None = None) -> Tensor:
        """All tokens of all frames behind the first `layers`, or behind all, BFLD."""
        visual, clips = self.clip.visual, pixels_BFCHW.shape[:2]
        move = shift_cls if self.kind == "cls" else shift_patches
        shift: Hook = lambda x_NLD: move(x_NLD.unflatten(0, clips), self.div).flatten(0, 1)
        x_NLD = clip_tower.image_tokens(visual, pixels_BFCHW.flatten(0, 1))
        for layer in range(layers or clip_tower.layers(visual)):
            here = shift if layer >= self.first else None
            if self.kind == "cls":
                x_NLD = clip_tower.run_block(visual, layer, x_NLD, shift=here)
            else:
                x_NLD = clip_tower.run_block(visual, layer, x_NLD, here)
        return x_NLD.unflatten(0, clips)

    def pooled(self, frames_BFD: Tensor, mask_BF: Tensor | None = None) -> Tensor:
        return super().pooled(frames_BFD, mask_BF) if self.frames_are_unit else frames_BFD.mean(dim=1)


def shift_cls(x_BFLC: Tensor, div: int) -> Tensor:
    """CLS's first C/div channels from the next frame, as many more from the one before; 0 where there is none."""
    cls_BFC, count = x_BFLC[:, :, 0], x_BFLC.shape[-1] // div
    from_next = pad(cls_BFC[:, 1:, :count], (0, 0, 0, 1))
    from_last = pad(cls_BFC[:, :-1, count : 2 * count], (0, 0, 1, 0))
    moved_BFC = torch.cat([from_next, from_last, cls_BFC[:, :, 2 * count :]], dim=-1)
    return torch.cat([moved_BFC[:, :, None], x_BFLC[:, :, 1:]], dim=2)


def shift_patches(y_BFLC: Tensor, div: int) -> Tensor:
    """Every (L/div)th token from the 1st on from the frame before, from the 4th on from the next, which wins."""
    stride, moved_BFLC = y_BFLC.shape[2] // div, y_BFLC.clone()
    moved_BFLC[:, 1:, 1::stride] = y_BFLC[:, :-1, 1::stride]
    moved_BFLC[:, :-1, 4::stride] = y_BFLC[:, 1:, 4::stride]
    return moved_BFLC
