"""A text-conditioned retriever: two towers and a scorer that looks at a text and a video together.

What it keeps of a video is no vector that a search index could hold, so it can only re-rank what a two-tower model
has found.

Shapes: T texts, V (or B) videos, Q features of a text, K of a video, F frames, L tokens, D joint width.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from training.models import clip as clip_tower
from training.models.two_tower import TextOut, TwoTower, VideoOut

SCORER_VALUES = 64 * 2**20  # values that a scorer holds of its pairs at once: 256 MiB


class Scorer(nn.Module, ABC):
    """Scores all pairs of some texts and some videos. It sees features only, so the towers need not know it."""

    def query(self, text: TextOut) -> Tensor:
        """What it reads of a text, TQD, without parameters: the sentence's features as they leave the projection."""
        return sentence(text)[:, None]

    def key(self, video: VideoOut) -> Tensor:
        """What it reads of a video, BKD, without parameters: the frames' features as they leave the tower."""
        return video.frames_BFD

    def cached(self, key_VKD: Tensor) -> Tensor:
        """What it makes of a video once, for whatever text: what a cache would hold."""
        return key_VKD

    @abstractmethod
    def pairs(self, query_TQD: Tensor, cached_VKD: Tensor) -> Tensor:
        """Scores TV within [-1, 1], or nearly; the logit scale is not among them."""

    @abstractmethod
    def values_per_pair(self, query_TQD: Tensor, cached_VKD: Tensor) -> int:
        """How many values `pairs` holds for each pair."""

    def forward(self, query_TQD: Tensor, key_VKD: Tensor) -> Tensor:
        return self.pairs(query_TQD, self.cached(key_VKD))


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
        """What a score reads of a video, BKD."""
        return self.scorer.key(video)

    def score(self, query_TQD: Tensor, key_VKD: Tensor) -> Tensor:
        """Scores TV; without gradient some pairs at a time, where the scorer is."""
        if torch.is_grad_enabled():
            scores_TV: Tensor = self.scorer(query_TQD, key_VKD)
            return scores_TV
        device = self.clip.logit_scale.device
        values = self.scorer.values_per_pair(query_TQD, self.scorer.cached(key_VKD[:1].to(device)))
        num_videos = max(1, SCORER_VALUES // values)
        num_texts = max(1, num_videos // len(key_VKD))

        def scored(key_BKD: Tensor) -> Tensor:
            cached_BKD = self.scorer.cached(key_BKD.to(device))
            parts = query_TQD.split(num_texts)
            return torch.cat([self.scorer.pairs(part.to(device), cached_BKD).to(query_TQD.device) for part in parts])

        return torch.cat([scored(key_BKD) for key_BKD in key_VKD.split(num_videos)], dim=1)

    def compile_towers(self) -> None:
        self.towers.compile_towers()

    def new_parameter_names(self) -> set[str]:
        towers = {f"towers.{name}" for name in self.towers.new_parameter_names()}
        return towers | {name for name, _ in self.named_parameters() if name.startswith("scorer.")}


def sentence(text: TextOut) -> Tensor:
    """The projected features of the end token, TD, not normalised."""
    ends_T = text.mask_TL.sum(dim=1) - 1
    return text.words_TLD[torch.arange(len(ends_T), device=ends_T.device), ends_T]
