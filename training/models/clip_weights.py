"""A CLIP of open_clip by its name, with weights from a tag, a file or S3."""

import logging
import tempfile
import zipfile
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from common import storage
from common.errors import ConfigError, ProjectError
from training.backbone import BACKBONES, Backbone, find
from training.models.open_clip_lib import (
    Eva,
    EvaBlock,
    ResidualAttentionBlock,
    TextTransformer,
    TimmBlock,
    TimmModel,
    TimmViT,
    VisionTransformer,
    open_clip,
)

OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")  # numbers beside the weights in OpenAI's files
Clip: TypeAlias = open_clip.CLIP | open_clip.CustomTextCLIP


def build_clip(backbone: str, pretrained: str | None, image_size: int | None = None, load: bool = True) -> Clip:
    """A CLIP by open_clip name, by a name in `backbones/`, or by the path of a model config. On the default device.

    Args:
        pretrained: open_clip tag, local path or s3:// URL; None gives random weights.
        image_size: pixels of a frame's side; tables of image positions are resampled to it (bicubic). None = its own.
        load: False = leave the weights random, for others to be loaded into it.

    Raises:
        ConfigError: the name is unknown, the weights don't fit, or the towers are not of a supported kind.
    """
    found = register(backbone)
    if found.unsupported:
        raise ConfigError(f"model.backbone={backbone}: {found.unsupported}")
    name, given = found.name, pretrained if load else None
    if given is None:
        logging.disable(logging.WARNING)  # open_clip warns that the weights are random, as asked
    try:
        with tempfile.TemporaryDirectory() as folder:
            weights = _local_weights(given, name, Path(folder))
            size, device = image_size, torch.get_default_device()
            model = open_clip.create_model(name, pretrained=weights, force_image_size=size, device=device)
    except ProjectError:
        raise
    except Exception as error:  # whatever torch.load, a hub client or load_state_dict raise
        if given is None:
            raise
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.pretrained={given} cannot be loaded into {backbone}: {reason}") from None
    finally:
        logging.disable(logging.NOTSET)
    _check_blocks(model, backbone)
    model.visual.image_mean, model.visual.image_std = _pixel_statistics(model.visual, name, pretrained)
    model.logit_scale.data.clamp_(max=4.6052)
    return model


def register(backbone: str) -> Backbone:
    """Find a backbone, and make one of ours known to open_clip. Raises ConfigError."""
    found = find(backbone)
    if found is None:
        own = ", ".join(sorted(p.stem for p in BACKBONES.glob("*.json")))
        raise ConfigError(
            f"model.backbone={backbone} is unknown: give an open_clip name (ViT-B-32, ...), {own}, or a .json path"
        )
    path = Path(backbone) if backbone.endswith(".json") else BACKBONES / f"{backbone}.json"
    if path.is_file():
        open_clip.add_model_config(path)
    return found


def clip_from_config(config: dict[str, object]) -> nn.Module:
    """A CLIP from open_clip's own configuration keys (`embed_dim`, `vision_cfg`, `text_cfg`, `quick_gelu`)."""
    return open_clip.CLIP(**config)


def _check_blocks(model: Clip, backbone: str) -> None:
    """Refuse what the JSON did not tell: other blocks than those that clip.py runs."""
    visual, text = model.visual, getattr(model, "text", model)
    if isinstance(visual, TimmModel):
        trunk = visual.trunk
        kinds = {TimmViT: TimmBlock, Eva: EvaBlock}.get(type(trunk), ())
        is_known = kinds and not getattr(trunk, "rope_mixed", False) and all(type(b) is kinds for b in trunk.blocks)
    else:
        blocks = [*visual.transformer.resblocks, *text.transformer.resblocks]
        is_known = isinstance(visual, VisionTransformer) and all(type(b) is ResidualAttentionBlock for b in blocks)
    if not is_known:
        raise ConfigError(
            f"model.backbone={backbone}: its image tower's blocks are not plain pre-norm attention blocks"
        )
    if not isinstance(text, TextTransformer | open_clip.CLIP):
        raise ConfigError(f"model.backbone={backbone}: its text tower is not open_clip's own")


def _pixel_statistics(visual: nn.Module, name: str, pretrained: str | None) -> tuple[list[float], list[float]]:
    """Mean and standard deviation that the backbone was trained on: by its tag, a file's by its first one.

    A function of the configuration, as weights that are loaded later do not tell theirs.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    known = open_clip.get_pretrained_cfg(name, pretrained if pretrained in tags else tags[0]) if tags else {}
    if not tags and isinstance(visual, TimmModel):
        known = visual.trunk.default_cfg
    return (
        list(known.get("mean") or open_clip.OPENAI_DATASET_MEAN),
        list(known.get("std") or open_clip.OPENAI_DATASET_STD),
    )


def plain_file(path: Path, folder: Path) -> Path:
    """The weights of a TorchScript archive, as OpenAI publishes its own, as a plain file; any other file as it is."""
    if not zipfile.is_zipfile(path):
        return path
    with zipfile.ZipFile(path) as archive:
        if not any(name.endswith("/constants.pkl") for name in archive.namelist()):
            return path
    state = torch.jit.load(path, map_location="cpu").state_dict()
    plain = folder / "weights.pt"
    torch.save({k: v.float() for k, v in state.items() if k not in OPENAI_SIZES}, plain)
    return plain


def _local_weights(pretrained: str | None, name: str, folder: Path) -> str | None:
    """A tag as it is; a path or URL as a local file, in `folder` if it has to be made."""
    if pretrained is None or pretrained in open_clip.list_pretrained_tags_by_model(name):
        return pretrained
    path = Path(pretrained).expanduser()
    if storage.is_s3(pretrained):
        path = folder / Path(pretrained).name
        storage.download(pretrained, path)
    if path.is_file():
        return str(plain_file(path.absolute(), folder))
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)[:5]) or "none"
    raise ConfigError(f"model.pretrained={pretrained} is neither a file nor a tag of {name} (its tags: {tags})")
