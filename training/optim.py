"""AdamW with parameter groups by declaration, and a learning rate that is a function of the step."""

import math

import numpy as np
import torch
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from training.config import OptimConfig
from training.models import Retriever


def build(model: Retriever, config: OptimConfig) -> AdamW:
    """Groups: backbone or new (each model names its new modules), matrices (decayed) or gains, biases, scale."""
    new = model.new_parameter_names()
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name in new, parameter.ndim >= 2), []).append(parameter)
    return AdamW(
        [
            {
                "params": parameters,
                "peak_lr": config.lr_new if is_new else config.lr,
                "lr": 0.0,
                "weight_decay": config.weight_decay if is_matrix else 0.0,
            }
            for (is_new, is_matrix), parameters in groups.items()
        ],
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def set_lr(optimizer: AdamW, config: OptimConfig, step: int) -> float:
    """Set the learning rates of `step` (linear warm-up, then half a cosine to 0); returns the factor of the peak."""
    warmup = round(config.warmup * config.steps)
    if step < warmup:
        factor = (step + 1) / warmup
    else:
        factor = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(config.steps - warmup, 1)))
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return factor


def average(model: Retriever, config: OptimConfig) -> AveragedModel | None:
    """The moving average of the weights, which begins as a copy after the first step; None without `optim.ema`."""
    if config.ema is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))


def seed_of(seed: int, step: int) -> int:
    """The seed of a step's random draws on the device: a function of the step, so that a restart draws the same."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0] >> 1)
