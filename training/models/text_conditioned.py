"""A text-conditioned retriever: two towers and a scorer that looks at a text and a video together.

What it keeps of a video is no vector that a search index could hold, so it can only re-rank what a two-tower model
has found.

Shapes: T texts, V (or B) videos, Q features of a text, F frames, L tokens, D joint width.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn

from training.models import clip as clip_tower
from training.models.two_tower import TextOut, TwoTower, VideoOut

SCORER_VALUES = 64 * 2**20  # values that a scorer holds of its pairs at once: 256 MiB


class Scorer(nn.Module, ABC):
    """Scores all pairs of some texts and some videos. It sees features only, so the towers need not know it."""

    FIXED_FRAMES: ClassVar[bool] = False  # True: its parameters have the number of frames as a size

    def query(self, text: TextOut) -> Tensor:
        """What it reads of a text, TQD, without parameters: the sentence's features as they leave the projection."""
        return sentence(text)[:, None]

    @abstractmethod
    def forward(self, query_TQD: Tensor, frames_VFD: Tensor) -> Tensor:
        """Scores TV within [-1, 1], or nearly; the logit scale is not among them."""

    @abstractmethod
    def values_per_pair(self, query_TQD: Tensor, frames_VFD: Tensor) -> int:
        """How many values `forward` holds for each pair."""


class TextConditioned(nn.Module):
    """A two-tower method's towers under a scorer. Its videos have no vector; `key` says what is kept of them."""

    is_plain_clip = False

    def __init__(self, towers: TwoTower, scorer: Scorer) -> None:
        super().__init__()
        self.towers, self.scorer = towers, scorer

    @property
    def clip(self) -> clip_tower.Clip:
        return self.towers.clip

    def encode_text(self, tokens_TL: Tensor) -> TextOut:
        return self.towers.encode_text(tokens_TL)

    def query(self, text: TextOut) -> Tensor:
        """What a score reads of a text, TQD."""
        return self.scorer.query(text)

    def key(self, video: VideoOut) -> Tensor:
        """What a score reads of a video, and a cache has to hold of it: BFD."""
        return video.frames_BFD

    def score(self, query_TQD: Tensor, key_VFD: Tensor) -> Tensor:
        """Scores TV; without gradient some texts at a time, where the scorer is."""
        if torch.is_grad_enabled():
            scores_TV: Tensor = self.scorer(query_TQD, key_VFD)
            return scores_TV
        device = next(self.scorer.parameters(), self.clip.logit_scale).device
        key_VFD = key_VFD.to(device)
        size = max(1, SCORER_VALUES // (len(key_VFD) * self.scorer.values_per_pair(query_TQD, key_VFD)))
        parts = [self.scorer(part.to(device), key_VFD).to(query_TQD.device) for part in query_TQD.split(size)]
        return torch.cat(parts)

    def compile_towers(self) -> None:
        self.towers.compile_towers()

    def new_parameter_names(self) -> set[str]:
        towers = {f"towers.{name}" for name in self.towers.new_parameter_names()}
        return towers | {name for name, _ in self.named_parameters() if name.startswith("scorer.")}


def sentence(text: TextOut) -> Tensor:
    """The projected features of the end token, TD, not normalised."""
    ends_T = text.mask_TL.sum(dim=1) - 1
    return text.words_TLD[torch.arange(len(ends_T), device=ends_T.device), ends_T]
