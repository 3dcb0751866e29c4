"""TS2-Net (Liu et al., ECCV 2022, arXiv 2207.07852): shifted tokens, a few selected ones, frames weighted by the text.

    towers   token shift in the last two image layers (training/models/token_shift.py); of each frame CLS and the k
             patches that a small network selects; the temporal transformer over these tokens of all frames
    scorer   a video's score is the mean of its frames' cosines, weighted by themselves

The towers alone are a two-tower method, and the scorer has no parameters; as published they are one.

Trained: all of CLIP, the network that selects, the temporal transformer. Cached per video: F x D. Multiply-adds per
text-video pair: F D (6.1 k at F = 12, D = 512).

Shapes: T texts, V (or B) videos, F frames, N = B*F images, L image tokens, CLS first, P = L - 1 patches, k of them
selected, n = k + 1, S noise samples, D joint width.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, one_hot

from common.errors import ConfigError
from training.model_config import TS2NetConfig, TS2NetScorerConfig
from training.models import clip as clip_tower
from training.models.text_conditioned import Scorer
from training.models.token_shift import TokenShift


class TS2Net(TokenShift):
    """Token shift, then selected patches beside each frame's CLS in the temporal transformer.

    Raises:
        ConfigError: the backbone has too few patches or the temporal transformer too few positions.
    """

    def __init__(self, config: TS2NetConfig, clip: clip_tower.Clip | None = None) -> None:
        super().__init__(config, clip)
        self.config, self.tokens_per_frame = config, 1 + config.num_selected
        patches = clip_tower.tokens_per_image(self.clip.visual) - 1
        positions = len(clip_tower.text_tower(self.clip).positional_embedding)
        if config.num_selected > patches:
            raise ConfigError(
                f"model.num_selected={config.num_selected} is more than the {patches} patches of {config.backbone}"
            )
        if config.num_frames * self.tokens_per_frame > positions:
            raise ConfigError(
                f"model.num_frames={config.num_frames} with {self.tokens_per_frame} tokens each (CLS and "
                f"model.num_selected) are more than model.temporal's {positions} positions: lower one of them"
            )
        self.predictor = TokenScores(clip_tower.joint_width(self.clip))

    def frame_features(self, pixels_BFCHW: Tensor) -> Tensor:
        tokens_BFLD = self.projected(pixels_BFCHW)
        noise_NSP = None
        if self.training or self.config.noise_in_eval:
            videos, frames, tokens, _ = tokens_BFLD.shape
            noise_NSP = torch.randn(videos * frames, self.config.samples, tokens - 1, device=tokens_BFLD.device)
        indicator_BFkP = self.indicator(self.predictor(tokens_BFLD), noise_NSP)
        return self.in_time(self.selected(tokens_BFLD, indicator_BFkP))

    def projected(self, pixels_BFCHW: Tensor) -> Tensor:
        """All tokens of all frames in the joint space, BFLD."""
        return clip_tower.project(self.clip.visual, self.tokens(pixels_BFCHW))

    def in_context(self, frames_BFD: Tensor, mask_BF: Tensor | None = None) -> Tensor:
        """As they are: they have been in the temporal transformer, with their patches."""
        return frames_BFD

    def indicator(self, scores_BFL: Tensor, noise_NSP: Tensor | None) -> Tensor:
        """How much each patch is the first, second, ... kth selected one of its frame, BFkP: 0 or 1 without noise."""
        scores_NP = scores_BFL[..., 1:].flatten(0, 1)
        scores_NP = scores_NP.float() if scores_NP.dtype.itemsize < 4 else scores_NP
        config = self.config
        indicator_NkP = top_k(scores_NP, config.num_selected, noise_NSP, config.sigma, config.full_gradient)
        return indicator_NkP.unflatten(0, scores_BFL.shape[:2])

    def selected(self, tokens_BFLD: Tensor, indicator_BFkP: Tensor) -> Tensor:
        """CLS and the selected patches, BFnD."""
        patches_BFkD = indicator_BFkP.to(tokens_BFLD.dtype) @ tokens_BFLD[:, :, 1:]
        return torch.cat([tokens_BFLD[:, :, :1], patches_BFkD], dim=2)

    def in_time(self, selected_BFnD: Tensor, mask_BF: Tensor | None = None) -> Tensor:
        """Every frame's CLS after the temporal transformer over all selected tokens of the video, BFD."""
        assert self.temporal is not None
        tokens_BLD, mask_BL = selected_BFnD.flatten(1, 2), None if mask_BF is None else self.token_mask(mask_BF)
        return (tokens_BLD + self.temporal(tokens_BLD, mask_BL))[:, :: self.tokens_per_frame]

    def token_mask(self, mask_BF: Tensor) -> Tensor:
        """The frames' mask for their tokens."""
        count = self.tokens_per_frame
        return mask_BF.repeat(1, count) if self.config.tiled_mask else mask_BF.repeat_interleave(count, dim=1)

    def frame_mask(self, mask_BF: Tensor) -> Tensor:
        """That of each frame's CLS, which a scorer reads: the given one, unless the tokens' is tiled."""
        return self.token_mask(mask_BF)[:, :: self.tokens_per_frame]


class TokenScores(nn.Module):
    """How much each token of a frame matters, within (-1, 1), by itself and the frame's CLS."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.in_conv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, half, bias=False), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(2 * half, half, bias=False), nn.GELU(), nn.Linear(half, 1, bias=False), nn.Tanh()
        )

    def forward(self, tokens_BFLD: Tensor) -> Tensor:
        """Scores BFL."""
        own = self.in_conv(tokens_BFLD)
        return self.out_conv(torch.cat([own, own[:, :, :1].expand_as(own)], dim=-1))[..., 0]


class TS2NetScorer(Scorer):
    """Frames that fit a text better count more. No parameters."""

    def __init__(self, config: TS2NetScorerConfig, *_: object) -> None:
        super().__init__()
        self.sharpness = config.sharpness

    def cached(self, key_VKD: Tensor) -> Tensor:
        return normalize(key_VKD, dim=-1)

    def pairs(self, query_TQD: Tensor, cached_VKD: Tensor, mask_VF: Tensor | None = None) -> Tensor:
        cosines_TVF = torch.einsum("td,vfd->tvf", normalize(query_TQD[:, 0], dim=-1), cached_VKD)
        fit_TVF = cosines_TVF if mask_VF is None else cosines_TVF * mask_VF
        logits_TVF = self.sharpness * normalize(fit_TVF, dim=-1)
        if mask_VF is not None:
            logits_TVF = logits_TVF.masked_fill(mask_VF == 0, -torch.inf)
        return (logits_TVF.softmax(dim=-1) * cosines_TVF).sum(dim=-1)

    def values_per_pair(self, query_TQD: Tensor, cached_VKD: Tensor) -> int:
        return 4 * cached_VKD.shape[1]


def top_k(
    scores_NP: Tensor, k: int, noise_NSP: Tensor | None = None, sigma: float = 1.0, full_gradient: bool = False
) -> Tensor:
    """The k best patches in the order of their places, NkP: one-hot rows, or with noise their mean over its samples.

    Args:
        full_gradient: that of the perturbed top-k (Cordonnier et al., CVPR 2021); False = its diagonal, as official: a
            patch's score is moved by its own entries only.
    """
    if noise_NSP is None:
        return one_hot(scores_NP.topk(k).indices.sort().values, scores_NP.shape[1]).to(scores_NP.dtype)
    noise_NSP, samples = noise_NSP.to(scores_NP.dtype), noise_NSP.shape[1]
    places_NkS = (scores_NP.detach()[:, None] + sigma * noise_NSP).topk(k).indices.sort().values.transpose(1, 2)
    empty_NkP = scores_NP.new_zeros(len(scores_NP), k, scores_NP.shape[1])
    mean_NkP = empty_NkP.scatter_add(2, places_NkS, torch.ones_like(places_NkS, dtype=scores_NP.dtype)) / samples
    zero_NP = scores_NP - scores_NP.detach()  # what carries the gradient and changes no value
    if full_gradient:
        moved_NS = torch.einsum("nsp,np->ns", noise_NSP, zero_NP)
        moved_NkP = empty_NkP.scatter_add(2, places_NkS, moved_NS[:, None].expand_as(places_NkS))
    else:
        drawn_NkS = noise_NSP.transpose(1, 2).gather(1, places_NkS)
        moved_NkP = empty_NkP.scatter_add(2, places_NkS, drawn_NkS) * zero_NP[:, None]
    return mean_NkP + moved_NkP / (samples * sigma)
