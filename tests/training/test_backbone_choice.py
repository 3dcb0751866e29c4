"""Which method goes on which backbone is known, and refused by name, before anything is built.

That a built tower agrees, and docs/backbones.md too.
"""

import re

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from cluster.package import check
from common import config as configs
from common.config import apply, validate
from common.errors import ConfigError
from tests.conftest import REPOSITORY
from tests.training.towers import IMAGE_VOP, METHODS, VOP
from training import models
from training.backbone import find
from training.config import PRESETS, TrainConfig
from training.model_config import ModelConfig
from training.models import clip as clip_tower
from training.models import timm_tower
from training.start import check_model

CAPTIONER = {"model.captioner": {"layers": 1}, "losses.caption": 0.5}


@pytest.mark.parametrize(
    ("backbone", "changes", "message"),
    [
        ("RN50", {}, "only a ViT image tower is supported"),
        ("convnext_base", {}, "only a ViT image tower is supported"),
        ("coca_ViT-B-32", {}, "not CoCa"),
        ("xlm-roberta-base-ViT-B-32", {}, "transformers' xlm-roberta-base"),
        ("ViT-B-16-SigLIP2", {"model.max_tokens": 32}, "padded to 64 tokens, set it to 64"),
        ("ViT-B-16-SigLIP2", CAPTIONER, "model.captioner needs CLIP's tokenizer"),
        ("EVA01-g-14", CAPTIONER, "model.captioner needs a text tower whose width is the joint one"),
        ("ViT-B-16-SigLIP", {"model.name": "token_shift"}, "model.name=token_shift needs an image tower that reads"),
        ("PE-Core-B-16", {"model.name": "clip_vip"}, "model.name=clip_vip needs an image tower that reads"),
        ("EVA02-B-16", {"model.name": "clip_vip"}, "model.name=clip_vip needs an image tower that is open_clip's own"),
        ("ViT-H-14-CLIPA", {"model": VOP}, "model.text_prompts=8 needs a causal text tower with CLIP's tokenizer"),
        (
            "ViT-B-16-SigLIP",
            {"model": METHODS["xclip"]},
            "model.scorer.name=xclip needs a text tower that is read out of",
        ),
        ("EVA01-g-14", {"model": METHODS["seq_transf"]}, "model.temporal needs a text tower whose width is the joint"),
        ("ViT-SO400M-14-SigLIP", {"model": {**IMAGE_VOP, "specific": "context"}}, "model.specific=context needs"),
    ],
)
def test_a_pair_is_refused_by_name_when_it_is_configured(backbone: str, changes: dict, message: str) -> None:
    config = configs.load(TrainConfig, "mean_pool", [], PRESETS)
    model = {"model": {**changes["model"], "backbone": backbone}} if "model" in changes else {}
    with pytest.raises(ConfigError, match=message) as error:
        apply(config, {"model.backbone": backbone, **changes, **model})
    assert backbone in str(error.value)


def test_cluster_submit_refuses_a_pair_before_it_sends_anything() -> None:
    overrides = ["run.storage=s3://x/runs", "data.dataset=s3://x/y", "tracking.uri=http://mlflow"]
    command = ["python", "-m", "training.train", "clip_vip", *overrides, "model.backbone=EVA02-B-16"]
    with pytest.raises(ConfigError, match=r"model\.name=clip_vip needs"):
        check(command, ["training/train.py", "training/presets/clip_vip.yaml"])


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("EVA02-E-14", "not plain pre-norm attention blocks"),
        ("vit_relpos_medium_patch16_cls_224", "not plain pre-norm attention blocks"),
        ("ViT-Z-99", "is unknown: give an open_clip name"),
    ],
)
def test_what_the_json_does_not_tell_is_refused_by_the_driver(backbone: str, message: str) -> None:
    config = apply(configs.load(TrainConfig, "mean_pool", [], PRESETS), {"model.backbone": backbone})
    with pytest.raises(ConfigError, match=message) as error:
        check_model(config)
    assert backbone in str(error.value)


@pytest.mark.parametrize(
    ("backbone", "cls", "mean"),
    [
        ("ViT-L-14", True, 0.48145466),
        ("ViT-B-16-SigLIP2", False, 0.5),
        ("EVA02-B-16", True, 0.48145466),
        ("PE-Core-B-16", False, 0.5),
        ("MobileCLIP-B", True, 0.0),
        ("ViTamin-S", False, 0.48145466),
        ("ViT-H-14-CLIPA", False, 0.485),
    ],
)
def test_the_json_and_the_built_towers_agree(backbone: str, cls: bool, mean: float) -> None:
    config = validate(type(configs.load(TrainConfig, "mean_pool", [], PRESETS).model), {"backbone": backbone})
    with torch.device("meta"):
        visual = models.build(config, load=False).clip.visual
    is_timm = hasattr(visual, "trunk")
    assert cls == ("cls" in find(backbone).traits)
    assert cls == (timm_tower.reads_cls(visual.trunk) if is_timm else visual.pool_type == "tok")
    assert is_timm == ("own ViT" not in find(backbone).traits)
    assert visual.image_mean[0] == mean and visual.image_size[0] == find(backbone).image_size


def test_pixels_are_normalised_as_a_tag_was_trained_also_without_its_weights() -> None:
    """A run's model is built from its configuration, and its weights come from its own file."""
    for tag, mean in (("openai", 0.48145466), ("laion2b_s32b_b82k", 0.5), (None, 0.48145466), ("my.pt", 0.48145466)):
        with torch.device("meta"):
            clip = clip_tower.build_clip("ViT-L-14", tag, load=False)
        assert clip.visual.image_mean[0] == mean


# The columns of the table in docs/backbones.md, with what asks for each.
COLUMNS: dict[str, list[dict]] = {
    "image prompts": [METHODS["mean_pool"], METHODS["vop^f+p"], {"name": "prompt_switch"}, METHODS["xpool"]],
    "text prompts": [{"name": "vop"}],
    "CLS": [METHODS["vop^c"], METHODS["token_shift"]],
    "Video Proxy": [METHODS["clip_vip"]],
    "captions": [{"name": "prompt_switch", "captioner": {"layers": 2}}],
    "temporal": [METHODS["seq_transf"]],
    "X-CLIP": [{"name": "mean_pool", "scorer": {"name": "xclip"}}],
}
ROWS = [
    (name, dict(zip(COLUMNS, cells[3:], strict=True)))
    for line in (REPOSITORY / "docs" / "backbones.md").read_text().splitlines()
    if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 3 + len(COLUMNS) and "yes" in cells
    for name in re.findall(r"`([^`-][^`]+)`", cells[0])
]


@pytest.mark.parametrize(("backbone", "cells"), ROWS)
def test_the_documents_table_is_what_is_refused(backbone: str, cells: dict[str, str]) -> None:
    kinds = TypeAdapter(ModelConfig)
    for column, methods in COLUMNS.items():
        for method in methods:
            given = {**method, "backbone": backbone}
            if cells[column] == "yes":
                assert kinds.validate_python(given).backbone == backbone
            else:
                with pytest.raises(ValidationError, match=f"needs .*{backbone} has not: choose another"):
                    kinds.validate_python(given)
