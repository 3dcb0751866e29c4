"""The moving shapes: what averaging frames can and can't tell."""

import torch

from common import shards
from common.config import apply
from training import models
from training.config import TrainConfig
from training.data.loader import eval_loader, open_cache
from training.encode import evaluate


def test_sorted_evaluation_frames_of_clip_and_twin_are_equal_and_mean_pooling_scores_half(tiny: TrainConfig):
    dataset, sha256 = shards.read_dataset(tiny.data.dataset)
    batches = list(eval_loader(tiny, dataset, open_cache(tiny, sha256), "test", 0, 1))
    clips = {
        info.video_id: (info.source_id, frames)
        for batch in batches
        for info, frames in zip(batch.videos, batch.frames_BFCHW, strict=True)
    }
    pairs: dict[str, list[list[bytes]]] = {}
    for source, frames in clips.values():
        pairs.setdefault(source, []).append([frame.numpy().tobytes() for frame in frames])
    for clip, twin in pairs.values():
        assert clip != twin and sorted(clip) == sorted(twin) and clip == twin[::-1]

    torch.manual_seed(0)
    blind = apply(tiny, {"model": {"name": "mean_pool", "backbone": "tiny"}, "losses.caption": 0})
    order = {}
    for name, config in {"mean_pool": blind, "prompt_switch": apply(tiny, {"model.cube_init_std": 1.0})}.items():
        model = models.build(config.model)
        scores = evaluate(model, batches, models.tokenize(config.model), config.eval, torch.device("cpu"))
        order[name] = scores["order"]
    assert abs(order["mean_pool"] - 0.5) <= 0.02
    assert order["prompt_switch"] != 0.5  # an untrained switch already tells them apart, if not the right way
