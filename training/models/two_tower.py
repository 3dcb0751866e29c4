"""A two-tower retriever: video and text become one vector each, independently; a score is their dot product.

Shapes: B videos, T texts, F frames, C channels, H height, W width, L tokens, D joint width, K counted caption
positions, V vocabulary.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from training.model_config import TwoTowerConfig
from training.models import clip as clip_tower
from training.models.captioner import Captioner, counted_rows
from training.models.temporal import TemporalTransformer


class VideoOut(NamedTuple):
    """What the video tower gives. `vector_BD` is unit length; `frames_BFD` are the features that it is the mean of.

    A method that reads out one feature for the whole clip gives it as the only one of its frames. `alone_BFD` are the
    frames before the temporal transformer; without one, the same.
    """

    vector_BD: Tensor
    frames_BFD: Tensor
    alone_BFD: Tensor


class TextOut(NamedTuple):
    """What the text tower gives. `vector_TD` is unit length; `mask_TL` is True up to the slot where it is read out."""

    vector_TD: Tensor
    words_TLD: Tensor
    mask_TL: Tensor


class Outputs(NamedTuple):
    """One forward pass over (video, caption) pairs; the caption fields are None for a model without a head."""

    text: TextOut
    video: VideoOut
    logit_scale: Tensor
    caption_logits_KV: Tensor | None
    caption_targets_K: Tensor | None


def clip_of(config: TwoTowerConfig, load: bool = True) -> clip_tower.Clip:
    """The towers that a configuration names; without `load`, random ones of the same kind. Raises ConfigError."""
    return clip_tower.build_clip(config.backbone, config.pretrained, config.image_size, load)


class TwoTower(nn.Module, ABC):
    """Base of the methods, which differ in `frame_features`. What is not in `clip` is new, and trains at `lr_new`."""

    def __init__(self, config: TwoTowerConfig, clip: clip_tower.Clip | None = None) -> None:
        super().__init__()
        self.clip = clip_of(config) if clip is None else clip
        self.is_frozen = config.freeze_backbone
        self.clip.requires_grad_(not self.is_frozen)
        if self.clip.logit_bias is not None:  # SigLIP's sigmoid has it; a softmax does not feel it
            self.clip.logit_bias.requires_grad_(False)
        head = config.captioner
        self.captioner = Captioner(self.clip, head.layers, head.dropout) if head else None
        self.temporal = None
        if config.temporal:
            self.temporal = TemporalTransformer(self.clip, config.temporal.layers, config.num_frames)

    def train(self, mode: bool = True) -> Self:
        """A frozen backbone stays in evaluation mode: what it computes is fixed."""
        super().train(mode)
        if self.is_frozen:
            self.clip.eval()
        return self

    @property
    def is_plain_clip(self) -> bool:
        """True if a frame's features are those of `clip` alone, so that its weights say all."""
        return False

    @abstractmethod
    def frame_features(self, pixels_BFCHW: Tensor) -> Tensor:
        """Frame features BFD in the joint space, not normalised."""

    def in_context(self, frames_BFD: Tensor, mask_BF: Tensor | None = None) -> Tensor:
        """Frame features after the temporal transformer, if there is one."""
        return frames_BFD if self.temporal is None else frames_BFD + self.temporal(frames_BFD, mask_BF)

    def pooled(self, frames_BFD: Tensor, mask_BF: Tensor | None = None) -> Tensor:
        """The mean of the unit frame vectors, BD. It is not unit length.

        Args:
            mask_BF: 1 at real frames, 0 at padding; None = all are real, as those of our own loader are.
        """
        unit_BFD = normalize(frames_BFD, dim=-1)
        if mask_BF is None:
            return unit_BFD.mean(dim=1)
        mask_BF1 = mask_BF[..., None].to(unit_BFD.dtype)
        return (mask_BF1 * unit_BFD).sum(dim=1) / mask_BF1.sum(dim=1).clamp(min=1)

    def encode_video(self, frames_BFCHW: Tensor) -> VideoOut:
        """uint8 frames → unit vector per video."""
        alone_BFD = self.frame_features(clip_tower.normalize_pixels(self.clip.visual, frames_BFCHW))
        frames_BFD = self.in_context(alone_BFD)
        return VideoOut(normalize(self.pooled(frames_BFD), dim=-1), frames_BFD, alone_BFD)

    def encode_text(self, tokens_TL: Tensor) -> TextOut:
        vector_TD, words_TLD = clip_tower.encode_text(self.clip, tokens_TL)
        positions = torch.arange(tokens_TL.shape[1], device=tokens_TL.device)
        return TextOut(
            normalize(vector_TD, dim=-1), words_TLD, positions <= clip_tower.ends(self.clip, tokens_TL)[:, None]
        )

    @property
    def towers(self) -> Self:
        """What encodes; a text-conditioned model has more."""
        return self

    def query(self, text: TextOut) -> Tensor:
        """What a score reads of a text: its vector, TD."""
        return text.vector_TD

    def key(self, video: VideoOut) -> Tensor:
        """What a score reads of a video, and an index holds of it: its vector, BD."""
        return video.vector_BD

    def score(self, query_TD: Tensor, key_VD: Tensor) -> Tensor:
        """Cosines TV."""
        return query_TD @ key_VD.T

    def compile_towers(self) -> None:
        """torch.compile both; parameters keep their names. A copy of the model must be taken before."""
        self.frame_features = torch.compile(self.frame_features)  # type: ignore[method-assign]
        self.encode_text = torch.compile(self.encode_text)  # type: ignore[method-assign]

    def forward(self, frames_BFCHW: Tensor, tokens_BL: Tensor, counted_K: Tensor | None = None) -> Outputs:
        """All that the losses need. Everything with a gradient leaves through here, so that DDP sees it.

        Args:
            counted_K: `counted_rows` of the tokens, if they are known: finding them on a GPU would wait for it.
        """
        video, text = self.encode_video(frames_BFCHW), self.encode_text(tokens_BL)
        logits = targets = None
        if self.captioner is not None:
            # Only counted positions go through the vocabulary-wide head: padding would cost as much as words.
            counted_K = counted_rows(tokens_BL) if counted_K is None else counted_K
            hidden_BLD = self.captioner(self.clip, tokens_BL[:, :-1], video.frames_BFD)
            logits = self.captioner.head(hidden_BLD.flatten(0, 1)[counted_K])
            targets = tokens_BL[:, 1:].flatten()[counted_K]
        return Outputs(text, video, self.clip.logit_scale.exp(), logits, targets)

    def new_parameter_names(self) -> set[str]:
        """Names of the parameters that are not the backbone's."""
        return {n for n, _ in self.named_parameters() if not n.startswith("clip.")}
