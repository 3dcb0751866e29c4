"""What encoding one video takes at inference: the second objective of a study."""

import functools
import warnings

from training.config import TrainConfig
from training.model_config import ModelConfig


def inference_cost(kind: str, config: TrainConfig) -> float:
    """Of one video with all its views, in images (`kind` "images") or in 1e9 floating-point operations ("gflops").

    Raises:
        ConfigError: the backbone is unknown or can't carry the method.
    """
    if kind == "images":
        return float(config.eval.views * config.model.num_frames)
    return config.eval.views * _gflop_of_clip(config.model)


@functools.lru_cache(maxsize=256)
def _gflop_of_clip(config: ModelConfig) -> float:
    """Counted while the model encodes one clip: matrix products and convolutions, two for a product with its sum.

    What fuses several of them into one kernel is off, since the counter would not look into it.
    """
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from training import models

    model = models.build(config, load=False).eval().requires_grad_(False)
    size = models.image_size(config)
    frames_BFCHW = torch.zeros(1, config.num_frames, 3, size, size, dtype=torch.uint8)
    fast, lstm, attention = torch.backends.mha, torch.backends.mkldnn.flags(enabled=False), sdpa_kernel(SDPBackend.MATH)
    was_fast = fast.get_fastpath_enabled()
    fast.set_fastpath_enabled(False)
    try:
        with (
            warnings.catch_warnings(action="ignore"),
            torch.no_grad(),
            lstm,
            attention,
            FlopCounterMode(display=False) as counter,
        ):
            model.towers.encode_video(frames_BFCHW)
    finally:
        fast.set_fastpath_enabled(was_fast)
    return float(counter.get_total_flops() / 1e9)
