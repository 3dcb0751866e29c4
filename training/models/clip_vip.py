"""Video Proxy of CLIP-ViP (Xue et al., ICLR 2023, arXiv 2209.06430): proxy tokens that see a whole video.

One sequence per video: CLIP's CLS and some new tokens, the proxies, then the patches of all frames. A proxy attends to
everything; a patch to the proxies and to its own frame. The vector is the first proxy's output.

Trained: all of CLIP, the added proxies and a temporal embedding. Cached per video: one D vector. Multiply-adds per
text-video pair: D. The paper's best numbers come from post-pretraining on 100 M pairs, which is not part of this.

Shapes: B videos, F frames, P patches of a frame, M proxies, L = M + F*P, H heads of width d, D width, E joint width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, scaled_dot_product_attention

from training.model_config import ClipVipConfig
from training.models import clip as clip_tower
from training.models.two_tower import TwoTower


class ClipVip(TwoTower):
    """CLIP's image tower over all frames at once. Any number of frames works: the temporal table is resampled."""

    def __init__(self, config: ClipVipConfig, clip: clip_tower.Clip | None = None) -> None:
        super().__init__(config, clip)
        width = clip_tower.image_width(self.clip.visual)
        self.added_cls = nn.Parameter(torch.randn(config.num_proxies - 1, width) * config.proxy_init_std)
        self.temporal_embedding = nn.Parameter(torch.zeros(config.num_frames, width))  # starts at CLIP's own function

    def frame_features(self, pixels_BFCHW: Tensor) -> Tensor:
        """The video's feature as the only one, B1E."""
        return clip_tower.project(self.clip.visual, self.tokens(pixels_BFCHW)[:, :1])

    def tokens(self, pixels_BFCHW: Tensor) -> Tensor:
        """All tokens behind the last layer, proxies first, then the patches frame by frame: BLD."""
        visual, (videos, frames) = self.clip.visual, pixels_BFCHW.shape[:2]
        cls_1D, patches_NPD = clip_tower.raw_image_tokens(visual, pixels_BFCHW.flatten(0, 1))
        proxies_MD = torch.cat([cls_1D, self.added_cls + visual.positional_embedding[:1]])
        patches_BFPD = patches_NPD.unflatten(0, (videos, frames)) + self._times(frames)[:, None].to(patches_NPD.dtype)
        proxies_BMD = proxies_MD.to(patches_BFPD.dtype).expand(videos, -1, -1)
        x_BLD = clip_tower.pre_norm(visual, torch.cat([proxies_BMD, patches_BFPD.flatten(1, 2)], dim=1))

        def attend(q_BHLd: Tensor, k_BHLd: Tensor, v_BHLd: Tensor) -> Tensor:
            return proxy_attention(q_BHLd, k_BHLd, v_BHLd, len(proxies_MD), frames)

        for layer in range(clip_tower.layers(visual)):
            x_BLD = clip_tower.run_block(visual, layer, x_BLD, attend=attend)
        return x_BLD

    def _times(self, frames: int) -> Tensor:
        """The temporal embedding FD, resampled linearly (half-pixel centres, as official) if there are others."""
        table_FD = self.temporal_embedding
        if frames == len(table_FD):
            return table_FD
        return interpolate(table_FD.T[None], size=frames, mode="linear", align_corners=False)[0].T


def proxy_attention(q_BHLd: Tensor, k_BHLd: Tensor, v_BHLd: Tensor, proxies: int, frames: int) -> Tensor:
    """The pattern as two full attentions, BHLd, at nearly the cost of frames on their own instead of L x L."""

    def per_frame(x_BHLd: Tensor) -> Tensor:
        """Patches with their frames in the batch, (B*F)HPd."""
        return x_BHLd[:, :, proxies:].unflatten(2, (frames, -1)).transpose(1, 2).flatten(0, 1)

    def seen(x_BHLd: Tensor) -> Tensor:
        """What the patches of a frame see, (B*F)H(M+P)d."""
        shared = x_BHLd[:, :, :proxies].repeat_interleave(frames, dim=0)
        return torch.cat([shared, per_frame(x_BHLd)], dim=2)

    of_proxies = scaled_dot_product_attention(q_BHLd[:, :, :proxies], k_BHLd, v_BHLd)
    of_patches = scaled_dot_product_attention(per_frame(q_BHLd), seen(k_BHLd), seen(v_BHLd))
    of_patches = of_patches.unflatten(0, (-1, frames)).transpose(1, 2).flatten(2, 3)
    return torch.cat([of_proxies, of_patches], dim=2)
