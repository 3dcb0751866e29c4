"""What a backbone is, from open_clip's own JSON of it: no open_clip, so that a client can refuse one that won't do.

A method needs some traits of its towers (`Trait`); which of them a backbone has is written here, once. What the JSON
doesn't tell (a timm model's blocks, a table's length) is told when the model is built: training/models/clip_weights.py.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

BACKBONES = Path(__file__).parent / "models" / "backbones"

Trait = Literal["cls", "own ViT", "causal text", "end token", "CLIP's tokenizer", "text as wide as frames"]
LACKS: dict[Trait, str] = {
    "cls": "an image tower that reads an image out of its CLS token",
    "own ViT": "an image tower that is open_clip's own ViT, not timm's",
    "causal text": "a causal text tower with CLIP's tokenizer",
    "end token": "a text tower that is read out of a sentence's end token",
    "CLIP's tokenizer": "CLIP's tokenizer, with its start and end tokens",
    "text as wide as frames": "a text tower whose width is the joint one",
}


class Backbone(NamedTuple):
    """A model by its name and open_clip's configuration of it."""

    name: str
    config: dict[str, Any]

    @property
    def vision(self) -> dict[str, Any]:
        return self.config.get("vision_cfg", {})

    @property
    def text(self) -> dict[str, Any]:
        return self.config.get("text_cfg", {})

    @property
    def image_size(self) -> int:
        """Pixels of a frame's side."""
        return int(self.vision.get("image_size", 224))

    @property
    def context(self) -> int:
        """Text positions."""
        return int(self.text.get("context_length", 77))

    @property
    def reads_padding(self) -> bool:
        """True if what stands behind a sentence changes its vector, so that it has to be padded to the context."""
        return self.text.get("no_causal_mask", False) or self.text.get("pool_type", "argmax") == "last"

    @property
    def traits(self) -> set[Trait]:
        pool = self.vision.get("timm_pool", "avg") if self.is_timm else self.vision.get("pool_type", "tok")
        text_pool = self.text.get("pool_type", "argmax")
        has: dict[Trait, bool] = {
            "cls": pool in ("tok", "token"),
            "own ViT": not self.is_timm,
            "end token": text_pool in ("argmax", "eos"),
            "CLIP's tokenizer": "hf_tokenizer_name" not in self.text,
            "causal text": not self.reads_padding and "hf_tokenizer_name" not in self.text,
            "text as wide as frames": self.text.get("width", 512) == self.config.get("embed_dim"),
        }
        return {trait for trait, is_there in has.items() if is_there}

    @property
    def is_timm(self) -> bool:
        return "timm_model_name" in self.vision

    @property
    def unsupported(self) -> str | None:
        """Why no method works on it, if none does."""
        vision, text = self.vision, self.text
        if "multimodal_cfg" in self.config or vision.get("attentional_pool") or text.get("embed_cls"):
            return "only two towers are supported, not CoCa"
        if "none" in (vision.get("pool_type"), text.get("pool_type")):
            return "its towers do not give one vector each"
        is_resnet = isinstance(vision.get("layers"), list)
        if is_resnet or not vision.get("timm_model_name", "vit").startswith(("vit", "eva")):
            return "only a ViT image tower is supported"
        if "hf_model_name" in text:
            return f"its text tower is transformers' {text['hf_model_name']}, only open_clip's own are supported"
        if vision.get("patch_dropout"):
            return "set vision_cfg.patch_dropout=0: methods need every token of an image"
        return None


def find(name: str) -> Backbone | None:
    """A backbone by open_clip name, by a name in `BACKBONES`, or by the path of a .json; None if there is none."""
    open_clip = importlib.util.find_spec("open_clip")  # finds, but does not import it
    folders = [BACKBONES]
    if open_clip is not None and open_clip.origin is not None:
        folders.append(Path(open_clip.origin).parent / "model_configs")
    places = [Path(name)] if name.endswith(".json") else [folder / f"{name}.json" for folder in folders]
    for path in places:
        try:
            config = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(config, dict) and {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys():
            return Backbone(path.stem, config)
    return None


def refusal(name: str, needs: dict[Trait, str], max_tokens: int) -> str | None:
    """Why a backbone can't carry a method, in a sentence; None if it can, or if it is not to be found from here.

    Args:
        needs: traits, each with the keys that ask for it.
    """
    backbone = find(name)
    if backbone is None:
        return None
    if backbone.unsupported:
        return f"model.backbone={name}: {backbone.unsupported}"
    for trait, asked_by in needs.items():
        if trait not in backbone.traits:
            return f"{asked_by} needs {LACKS[trait]}, which model.backbone={name} has not: choose another of the two"
    if backbone.reads_padding and max_tokens < backbone.context:
        return (
            f"model.max_tokens={max_tokens}: {name} has been trained on sentences padded to {backbone.context} tokens, "
            f"set it to {backbone.context}"
        )
    return None
