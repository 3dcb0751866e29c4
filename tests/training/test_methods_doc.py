"""The table of docs/methods.md is what the code gives, and every method's docstring states the same four things."""

import re
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from common import config as configs
from tests.conftest import REPOSITORY
from training import models
from training.config import PRESETS, TrainConfig
from training.models import clip as clip_tower
from training.models.clip import open_clip

TEXT = (REPOSITORY / "docs" / "methods.md").read_text()
# method | preset | kind | trained | cached | multiply-adds | ...
ROWS = {
    cells[1].strip("`"): cells[2:6]
    for line in TEXT.splitlines()
    if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) >= 6 and cells[1].startswith("`")
}
KINDS = {"two towers": models.TwoTower, "text-conditioned": models.TextConditioned}


def number(cell: str) -> int:
    return int(cell.split()[0].replace(",", ""))


def test_every_method_has_a_row_and_a_section() -> None:
    presets = [configs.load(TrainConfig, name, [], PRESETS).model for name in ROWS]
    assert {preset.name for preset in presets} == set(models.MODELS)
    assert {preset.scorer.name for preset in presets if preset.scorer} == set(models.SCORERS)
    for name in {*models.MODELS, *models.SCORERS}:
        assert re.search(rf"^## .*`(model|scorer)\.name={name}`", TEXT, re.M), name


@pytest.mark.parametrize("preset", ROWS)
def test_the_figures_are_those_of_the_built_model(preset: str) -> None:
    """On ViT-B/32 without weights. A pair's multiply-adds are what one more text and one more video cost together."""
    kind, trained, cached, per_pair = ROWS[preset]
    config = configs.load(TrainConfig, preset, [], PRESETS)
    frames, words = config.eval.views * config.model.num_frames, config.model.max_tokens
    with torch.device("meta"), torch.no_grad():
        model = models.build(config.model, clip_tower.clip_from_config(open_clip.get_model_config("ViT-B-32")))
        assert isinstance(model, KINDS[kind])
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert number(trained) == (count if config.optim.steps else 0)

        def pairs(texts: int, videos: int) -> tuple[int, int]:
            """Bytes of a video in float32; multiply-adds of all pairs."""
            word = torch.zeros(texts, words, 512)
            query = model.query(models.TextOut(word[:, 0], word, torch.ones(texts, words, dtype=torch.bool)))
            frame = torch.zeros(videos, frames, 512)
            kept = model.key(models.VideoOut(frame[:, 0], frame, frame))
            score = model.score
            if isinstance(model, models.TextConditioned):
                kept, score = model.scorer.cached(kept), model.scorer.pairs
            with FlopCounterMode(display=False) as counter:
                score(query, kept)
            return 4 * kept[0].numel(), counter.get_total_flops() // 2

        (size, more), (_, texts), (_, videos), (_, least) = (pairs(t, v) for t, v in ((3, 3), (3, 2), (2, 3), (2, 2)))
        assert number(cached) == size
        assert number(per_pair) == more - texts - videos + least


@pytest.mark.parametrize("name", [*models.MODELS, *(f"{name} (scorer)" for name in models.SCORERS)])
def test_a_docstring_says_what_is_trained_cached_and_paid_for_a_pair(name: str) -> None:
    method = models.SCORERS[name.split()[0]] if "scorer" in name else models.MODELS[name]
    text = re.sub(r"\s+", " ", sys.modules[method.__module__].__doc__ or "")
    for statement in (r"et al\.", r"Trained: ", r"Cached per video: ", r"Multiply-adds per text-video pair: "):
        assert re.search(statement, text), statement
