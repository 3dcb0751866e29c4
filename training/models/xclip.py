"""X-CLIP (Ma et al., ACM MM 2022, arXiv 2207.07285): sentence and words against video and frames, four similarities.

Its video vector is CLIP4Clip-seqTransf's, so it was published on what is `model.name=seq_transf` here; its frames are
those before the temporal transformer.

Trained: all of CLIP, the temporal transformer, and matrices that begin as the identity. Cached per video: (F + 1) x D.
Multiply-adds per text-video pair: W F D + W D + F D + D for the products (220 k at W = 32, F = 12, D = 512), and
F W^2 + W F^2 + 2 W^2 + 2 F^2 for the small matrices (19 k).

Shapes: T texts, V videos, W words, Q = 1 + W, F frames, K = 1 + F, D joint width; `n` words or frames.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, pad

from training.model_config import XClipConfig
from training.models import clip as clip_tower
from training.models.text_conditioned import Scorer
from training.models.two_tower import TextOut, VideoOut


class Terms(NamedTuple):
    """The four similarities, each TV."""

    video_sentence: Tensor
    video_word: Tensor
    sentence_frame: Tensor
    frame_word: Tensor


class XClip(Scorer):
    """The mean of four similarities; a matrix of them becomes one by attention over itself."""

    def __init__(self, config: XClipConfig, clip: clip_tower.Clip, num_frames: int, num_words: int) -> None:
        super().__init__()
        width = clip_tower.joint_width(clip)
        self.temperature, self.padded_words, self.num_words = config.temperature, config.padded_words, num_words
        self.global_mat_weight, self.local_mat_weight = _identity(width), _identity(width)
        self.word_logit_weight, self.word_mat_weight, self.word_mat_weight2 = (_identity(num_words) for _ in range(3))
        self.frame_logit_weight, self.frame_mat_weight, self.frame_mat_weight2 = (
            _identity(num_frames) for _ in range(3)
        )

    def query(self, text: TextOut) -> Tensor:
        """The sentence and W words, unit length but for padding, which is zero unless it is to count: TQD."""
        words_TLD = normalize(text.words_TLD, dim=-1)
        missing = self.num_words - words_TLD.shape[1]
        if self.padded_words:
            assert not missing, f"{missing} padded words are missing: see training.models.tokenize"
        else:
            words_TLD = pad(words_TLD * text.mask_TL[..., None], (0, 0, 0, missing))
        return torch.cat([text.vector_TD[:, None], words_TLD], dim=1)

    def key(self, video: VideoOut) -> Tensor:
        """The video and its frames, unit length: VKD."""
        return torch.cat([video.vector_BD[:, None], normalize(video.alone_BFD, dim=-1)], dim=1)

    def pairs(self, query_TQD: Tensor, cached_VKD: Tensor) -> Tensor:
        return torch.stack(self.terms(query_TQD, cached_VKD)).mean(0)

    def terms(self, query_TQD: Tensor, cached_VKD: Tensor) -> Terms:
        sentence_TD, words_TWD = query_TQD[:, 0], query_TQD[:, 1:]
        video_VD, frames_VFD = cached_VKD[:, 0], cached_VKD[:, 1:]
        is_word_T1W = None if self.padded_words else words_TWD.any(dim=-1)[:, None]
        word_frame_TVFW = torch.einsum("twd,vfd->tvfw", words_TWD @ self.local_mat_weight, frames_VFD)
        by_frame_TVF = self._attended(
            word_frame_TVFW, self.word_mat_weight, None if is_word_T1W is None else is_word_T1W[:, None]
        )
        by_word_TVW = self._attended(word_frame_TVFW.transpose(-1, -2), self.frame_mat_weight)
        words_first_TV = self._attended(by_frame_TVF, self.frame_mat_weight2)
        frames_first_TV = self._attended(by_word_TVW, self.word_mat_weight2, is_word_T1W)
        return Terms(
            sentence_TD @ self.global_mat_weight @ video_VD.T,
            self._attended(torch.einsum("twd,vd->tvw", words_TWD, video_VD), self.word_logit_weight, is_word_T1W),
            self._attended(torch.einsum("td,vfd->tvf", sentence_TD, frames_VFD), self.frame_logit_weight),
            (words_first_TV + frames_first_TV) / 2,
        )

    def _attended(self, scores_n: Tensor, matrix_nn: Tensor, is_real_n: Tensor | None = None) -> Tensor:
        """Scores ...n → ..., weighted by their own softmax times a matrix. What is not real is zero already."""
        logits_n = scores_n / self.temperature
        if is_real_n is not None:
            logits_n = logits_n.masked_fill(~is_real_n, -torch.inf)
        return ((logits_n.softmax(dim=-1) @ matrix_nn) * scores_n).sum(dim=-1)

    def values_per_pair(self, query_TQD: Tensor, cached_VKD: Tensor) -> int:
        return 4 * query_TQD.shape[1] * cached_VKD.shape[1]


def _identity(width: int) -> nn.Parameter:
    return nn.Parameter(torch.eye(width))
