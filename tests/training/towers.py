"""Tiny towers of every kind that a backbone may have, as open_clip configurations; timm's are registered with timm.

Each is as the real ones that it stands for, but for its size: SigLIP (attention pooling, no CLS), EVA02-CLIP (rotary
positions, SwiGLU), Perception Encoder (both, and a LayerNorm before), MobileCLIP2-L (a timm ViT with CLS, a
bidirectional text tower), CLIPA (pooled over patches), EVA-giant (layer scale, no rotary), DINOv2's shape.
"""

import json
from pathlib import Path
from typing import Any

from training.models.open_clip_lib import open_clip  # first: it lets timm be imported

# isort: split
from timm.models._registry import generate_default_cfgs, register_model
from timm.models.eva import Eva, _create_eva
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer

assert open_clip
SIZES: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4}
ROTARY: dict[str, Any] = {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4)}
CFG = {"input_size": (3, 32, 32), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "pool_size": None}
default_cfgs = generate_default_cfgs({f"{name}.x": CFG for name in ("vit_micro_siglip", "vit_micro_pe", "vit_micro",
    "eva_micro", "eva02_micro")})  # fmt: skip


@register_model
def vit_micro_siglip(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    values = {**SIZES, "class_token": False, "global_pool": "map", **kwargs}
    return _create_vision_transformer("vit_micro_siglip", pretrained=pretrained, **values)


@register_model
def vit_micro(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    values = {**SIZES, "pre_norm": True, "drop_path_rate": 0.1, **kwargs}
    return _create_vision_transformer("vit_micro", pretrained=pretrained, **values)


@register_model
def eva_micro(pretrained: bool = False, **kwargs: Any) -> Eva:
    return _create_eva("eva_micro", pretrained=pretrained, **{**SIZES, "init_values": 0.5, **kwargs})


@register_model
def eva02_micro(pretrained: bool = False, **kwargs: Any) -> Eva:
    glu = {"qkv_fused": False, "mlp_ratio": 8 / 3, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True}
    return _create_eva("eva02_micro", pretrained=pretrained, **{**SIZES, **ROTARY, **glu, **kwargs})


@register_model
def vit_micro_pe(pretrained: bool = False, **kwargs: Any) -> Eva:
    values = {"attn_type": "rope", "use_pre_transformer_norm": True, "rope_grid_offset": 1.0, "attn_pool_num_heads": 4}
    values |= {"rope_grid_indexing": "xy", "global_pool": "map"}
    return _create_eva("vit_micro_pe", pretrained=pretrained, **{**SIZES, **ROTARY, **values, **kwargs})


IMAGE = {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 16, "layers": 3}
TEXT = {"context_length": 20, "vocab_size": 4096, "width": 64, "heads": 4, "layers": 2}


def _timm(name: str, pool: str, proj: str | None = None) -> dict[str, Any]:
    return {"image_size": 32, "timm_model_name": name, "timm_pool": pool, "timm_proj": proj}


def _config(image: dict[str, Any], text: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {"embed_dim": 64, "vision_cfg": {**IMAGE, **image} if "timm_pool" not in image else image,
            "text_cfg": {**TEXT, **text}, **changes}  # fmt: skip


BOTH_WAYS = {"no_causal_mask": True}
CUSTOM = {"custom_text": True}
SIGLIP_TEXT = {**BOTH_WAYS, "pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-6}}
TOWERS: dict[str, dict[str, Any]] = {
    "clip": _config({}, {}, quick_gelu=True),
    "dinov2": _config({"no_ln_pre": True, "norm_kwargs": {"eps": 1e-6}, "ls_init_value": 0.5}, {}),
    "clipa": _config({"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
                     {**BOTH_WAYS, "pool_type": "last"}),
    "gap": _config({"pool_type": "avg"}, {"pool_type": "eos", "eos_id": 4095}),
    "siglip": _config(_timm("vit_micro_siglip", "map", "none"), {**SIGLIP_TEXT, "act_kwargs": {"approximate": "tanh"}},
                      init_logit_bias=-10, **CUSTOM),
    "mobileclip": _config(_timm("vit_micro", "token"), BOTH_WAYS, **CUSTOM),
    "vitamin": _config(_timm("vit_micro", "avg", "linear"), {"proj_type": "none"}, **CUSTOM),
    "eva": _config(_timm("eva_micro", "token"), {}, **CUSTOM),
    "eva02": _config(_timm("eva02_micro", "token"), {}, **CUSTOM),
    "pe": _config(_timm("vit_micro_pe", "map"), {}, **CUSTOM),
}  # fmt: skip


def write(name: str, folder: Path, **changes: Any) -> str:
    """The path of a tower's configuration file."""
    path = folder / f"micro_{name}.json"
    path.write_text(json.dumps({**TOWERS[name], **changes}))
    return str(path)


# Methods on them, by the name that tests give them.
VOP = {"name": "vop", "prompt_init_std": 0.5, "max_tokens": 12, "freeze_backbone": False}
IMAGE_VOP = {**VOP, "max_tokens": 77, "text_prompts": 0}
METHODS: dict[str, dict] = {
    "mean_pool": {"name": "mean_pool"},
    "seq_transf": {"name": "seq_transf", "temporal": {"layers": 2}},
    "prompt_switch": {"name": "prompt_switch", "num_prompts": 2, "captioner": {"layers": 1}},
    "vop": VOP,
    "vop^f+p": {**IMAGE_VOP, "joint_layers": 2, "specific": "position"},
    "vop^c": {**IMAGE_VOP, "specific": "context"},
    "token_shift": {"name": "token_shift"},
    "token_shift, patches": {"name": "token_shift", "shift": "patches", "div": 7},
    "clip_vip": {"name": "clip_vip", "proxy_init_std": 0.5},
    "xpool": {"name": "mean_pool", "scorer": {"name": "xpool"}},
    "xclip": {"name": "seq_transf", "temporal": {"layers": 1}, "scorer": {"name": "xclip"}},
    "ts2net": {"name": "ts2net", "temporal": {"layers": 1}, "samples": 8, "scorer": {"name": "ts2net"}},
}
