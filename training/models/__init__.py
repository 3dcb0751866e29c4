"""Methods by name. To add one: a config class in training/model_config.py, a file here, a line in MODELS, a preset."""

from collections.abc import Callable

from torch import Tensor

from training.model_config import ModelConfig
from training.models.clip import image_size_of, tokenizer
from training.models.clip_vip import ClipVip
from training.models.mean_pool import MeanPool
from training.models.prompt_switch import PromptSwitch
from training.models.seq_transf import SeqTransf
from training.models.token_shift import TokenShift
from training.models.two_tower import Outputs, TextOut, TwoTower, VideoOut
from training.models.vop import VoP

__all__ = ["MODELS", "Outputs", "TextOut", "TwoTower", "VideoOut", "build", "image_size_of", "tokenize"]

MODELS: dict[str, Callable[..., TwoTower]] = {
    "mean_pool": MeanPool,
    "seq_transf": SeqTransf,
    "prompt_switch": PromptSwitch,
    "vop": VoP,
    "token_shift": TokenShift,
    "clip_vip": ClipVip,
}


def build(config: ModelConfig) -> TwoTower:
    """The model that a config names. Raises ConfigError if its backbone can't carry it."""
    return MODELS[config.name](config)


def tokenize(config: ModelConfig) -> Callable[[list[str]], Tensor]:
    """The tokenizer of the model's backbone: sentences → ids TL."""
    return tokenizer(config.backbone, config.max_tokens)
