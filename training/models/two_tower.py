"""A two-tower retriever: video and text become one vector each, independently; a score is their dot product.

Shapes: B videos, T texts, F frames, C channels, H height, W width, L tokens, D joint width, K counted caption
positions, V vocabulary.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from training.model_config import TwoTowerConfig
from training.models import clip as clip_tower
from training.models.captioner import Captioner, counted_rows


class VideoOut(NamedTuple):
    """What the video tower gives. `vector_BD` is unit length, or None for a model that can only re-rank."""

    vector_BD: Tensor | None
    frames_BFD: Tensor


class TextOut(NamedTuple):
    """What the text tower gives. `vector_TD` is unit length; `mask_TL` is True at real tokens."""

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


class TwoTower(nn.Module, ABC):
    """Base of the methods that differ in `frame_features` only.

    Subclasses name their new modules in `NEW`: parameters under these names train at `optim.lr_new`.
    """

    NEW: ClassVar[tuple[str, ...]] = ("captioner",)

    def __init__(self, config: TwoTowerConfig, clip: clip_tower.open_clip.CLIP | None = None) -> None:
        super().__init__()
        self.clip = clip_tower.build_clip(config.backbone, config.pretrained) if clip is None else clip
        self.captioner = Captioner(self.clip, config.captioner.layers) if config.captioner else None

    @property
    def is_plain_clip(self) -> bool:
        """True if a frame's features are those of `clip` alone, so that its weights say all."""
        return False

    @abstractmethod
    def frame_features(self, pixels_BFCHW: Tensor) -> Tensor:
        """Frame features BFD in the joint space, not normalised."""

    def encode_video(self, frames_BFCHW: Tensor) -> VideoOut:
        """uint8 frames → unit vector per video: the mean of the unit frame vectors, made unit length again."""
        frames_BFD = self.frame_features(clip_tower.normalize_pixels(self.clip.visual, frames_BFCHW))
        vector_BD = normalize(normalize(frames_BFD, dim=-1).mean(dim=1), dim=-1)
        return VideoOut(vector_BD, frames_BFD)

    def encode_text(self, tokens_TL: Tensor) -> TextOut:
        vector_TD, words_TLD = clip_tower.encode_text(self.clip, tokens_TL)
        positions = torch.arange(tokens_TL.shape[1], device=tokens_TL.device)
        return TextOut(normalize(vector_TD, dim=-1), words_TLD, positions < clip_tower.lengths(tokens_TL)[:, None])

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
            hidden_BLD = self.captioner(self.clip, tokens_BL, video.frames_BFD)
            logits = self.captioner.head(hidden_BLD.flatten(0, 1)[counted_K])
            targets = tokens_BL[:, 1:].flatten()[counted_K]
        return Outputs(text, video, self.clip.logit_scale.exp(), logits, targets)

    def new_parameter_names(self) -> set[str]:
        """Names of the parameters that are not the backbone's."""
        return {n for n, _ in self.named_parameters() if n.split(".")[0] in self.NEW}
