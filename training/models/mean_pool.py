"""Mean pooling over frames encoded one by one (CLIP4Clip-meanP, Luo et al. 2021): the baseline, blind to order.

Trained: all of CLIP; with `optim.steps=0` nothing, which is zero-shot CLIP. Cached per video: one D vector.
Multiply-adds per text-video pair: D.
"""

from torch import Tensor

from training.models import clip as clip_tower
from training.models.two_tower import TwoTower


class MeanPool(TwoTower):
    """Each frame goes through CLIP's image tower on its own."""

    def frame_features(self, pixels_BFCHW: Tensor) -> Tensor:
        visual = self.clip.visual
        x_NLD = clip_tower.image_tokens(visual, pixels_BFCHW.flatten(0, 1))
        for layer in range(clip_tower.layers(visual)):
            x_NLD = clip_tower.run_block(visual, layer, x_NLD)
        return clip_tower.project(visual, clip_tower.pooled(visual, x_NLD)).unflatten(0, pixels_BFCHW.shape[:2])

    @property
    def is_plain_clip(self) -> bool:
        return True
