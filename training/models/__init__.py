"""Methods by name. To add one: a config class in training/model_config.py, a file here, a line below, a preset."""

from collections.abc import Callable

from torch import Tensor

from training.model_config import ModelConfig
from training.models.clip_vip import ClipVip
from training.models.clip_weights import Clip, register
from training.models.mean_pool import MeanPool
from training.models.prompt_switch import PromptSwitch
from training.models.seq_transf import SeqTransf
from training.models.text_conditioned import Scorer, TextConditioned
from training.models.token_shift import TokenShift
from training.models.tokenizer import detokenizer, tokenizer
from training.models.ts2net import TS2Net, TS2NetScorer
from training.models.two_tower import Outputs, TextOut, TwoTower, VideoOut, clip_of
from training.models.vop import VoP
from training.models.xclip import XClip
from training.models.xpool import XPool

__all__ = ["MODELS", "SCORERS", "Outputs", "Retriever", "TextConditioned", "TextOut", "TwoTower", "VideoOut"]
__all__ += ["build", "detokenizer", "image_size", "tokenize"]

Retriever = TwoTower | TextConditioned

MODELS: dict[str, Callable[..., TwoTower]] = {
    "mean_pool": MeanPool,
    "seq_transf": SeqTransf,
    "prompt_switch": PromptSwitch,
    "vop": VoP,
    "token_shift": TokenShift,
    "ts2net": TS2Net,
    "clip_vip": ClipVip,
}

SCORERS: dict[str, Callable[..., Scorer]] = {
    "xpool": XPool,
    "xclip": XClip,
    "ts2net": TS2NetScorer,
}


def build(config: ModelConfig, clip: Clip | None = None, load: bool = True) -> Retriever:
    """The model that a config names. Raises ConfigError if its backbone can't carry it.

    Args:
        clip: the towers to start from; None = as the config says.
        load: False = do not load `pretrained`: other weights will replace it, as those of `init_from` do.
    """
    towers = MODELS[config.name](config, clip_of(config, load and config.init_from is None) if clip is None else clip)
    if config.scorer is None:
        return towers
    words = min(config.max_tokens, towers.clip.context_length)
    return TextConditioned(towers, SCORERS[config.scorer.name](config.scorer, towers.clip, config.num_frames, words))


def tokenize(config: ModelConfig) -> Callable[[list[str]], Tensor]:
    """The tokenizer of the model's backbone: sentences → ids TL, as long as the longest of them or `max_tokens`."""
    is_padded = config.scorer is not None and config.scorer.reads_padding
    return tokenizer(config.backbone, config.max_tokens, is_padded)


def image_size(config: ModelConfig) -> int:
    """Pixels of a frame's side, without building the model."""
    return config.image_size or register(config.backbone).image_size
