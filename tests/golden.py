"""What each reference file holds, said with our methods: method → every `out.*` and `grad.*` that we find for it.

An entry configures the registered method by the file's sizes, names its weights as the file does, and runs it. No model
arithmetic: what is computed here is only what a file's description (shared/golden/README.md) adds to a model, such as
the sum whose derivative its gradients are.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from training import losses, models
from training.model_config import (
    ClipVipConfig,
    MeanPoolConfig,
    PromptSwitchConfig,
    SeqTransfConfig,
    TokenShiftConfig,
    TwoTowerConfig,
    VoPConfig,
)
from training.models.clip import clip_from_config
from training.models.clip_vip import ClipVip
from training.models.token_shift import TokenShift, shift_cls
from training.models.two_tower import Outputs, TwoTower

Values = dict[str, Tensor]
NOTHING: Mapping[str, Any] = MappingProxyType({})


class Golden(NamedTuple):
    """A reference file, its floats in the precision of the run."""

    sizes: Mapping[str, Any]
    weights: Values
    inputs: Values

    @property
    def dtype(self) -> torch.dtype:
        return next(v.dtype for v in self.weights.values() if v.is_floating_point())


def build(
    golden: Golden,
    config: TwoTowerConfig,
    names: Mapping[str, str] = NOTHING,
    *,
    vision: Mapping[str, object] = NOTHING,
    clip: Mapping[str, object] = NOTHING,
    is_partial: bool = False,
) -> TwoTower:
    """The registered method at the file's sizes, with the file's weights.

    Args:
        names: the file's names for those of our parameters that it does not call as CLIP or as we do.
        vision, clip: changes of the image tower's and of CLIP's configuration.
        is_partial: the file holds not all of the towers; the rest is random, and not compared.
    """
    tower = clip_from_config(clip_sizes(golden.sizes, vision, clip))
    model = models.MODELS[config.name](config, tower).to(golden.dtype)  # type: ignore[attr-defined]
    own = model.state_dict()
    theirs = {names.get(k, k.removeprefix("clip.")): k for k in own}
    given = {theirs.get(k, k): v for k, v in golden.weights.items()}
    given = {k: v.reshape(own[k].shape) if k in own else v for k, v in given.items()}  # dimensions of 1
    towers = {k: v for k, v in own.items() if k.startswith("clip.")} if is_partial else {}
    model.load_state_dict({**towers, **given})
    return model


def clip_sizes(sizes: Mapping[str, Any], vision: Mapping[str, object], clip: Mapping[str, object]) -> dict[str, Any]:
    width, heads = sizes["width"], sizes["heads"]
    image = {"image_size": sizes["image"], "patch_size": sizes["patch"], "width": width, "layers": sizes["layers"]}
    text = {
        "context_length": sizes["ctx"],
        "vocab_size": sizes["vocab"],
        "width": sizes["text_width"],
        "heads": sizes["text_heads"],
        "layers": sizes["text_layers"],
    }
    image |= {"head_width": width // heads, **vision}
    return {"embed_dim": sizes["embed"], "quick_gelu": True, "vision_cfg": image, "text_cfg": text, **clip}


def gradients(
    model: torch.nn.Module,
    inputs: Mapping[str, Tensor] = NOTHING,
    names: Mapping[str, str] = NOTHING,
) -> Values:
    """`grad.*` of every parameter, under the file's names, and of the inputs."""
    named = {names.get(name, name.removeprefix("clip.")): p for name, p in model.named_parameters()}
    return {f"grad.{name}": value.grad for name, value in {**named, **inputs}.items() if value.grad is not None}


def objective(outputs: Outputs, tokens: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Both losses of Prompt Switch, of one whole batch in one process, written down as the paper has them."""
    vectors = outputs.text.vector_TD, outputs.video.vector_BD
    contrastive = losses.contrastive(*vectors, outputs.logit_scale, [len(tokens)])
    caption = losses.caption(outputs, weights, losses.caption_total(tokens, weights))
    return {"contrastive": contrastive, "caption": 0.5 * caption}


def promptswitch(golden: Golden) -> Values:
    sizes, inputs = golden.sizes, golden.inputs
    config = PromptSwitchConfig(
        backbone="from file",
        num_frames=sizes["frames"],
        num_prompts=sizes["prompts"],
        captioner={"layers": sizes["cap_layers"]},  # type: ignore[arg-type]
    )
    model = build(golden, config)
    outputs = model(inputs["video"], inputs["text"])
    parts = objective(outputs, inputs["text"], inputs["token_weight"].detach())
    torch.stack(list(parts.values())).sum().backward()
    assert outputs.caption_logits_KV is not None
    return {
        "out.text_features": outputs.text.vector_TD,
        "out.frame_features": normalize(outputs.video.frames_BFD, dim=-1),
        "out.video_features": outputs.video.vector_BD,
        "out.similarity": outputs.text.vector_TD @ outputs.video.vector_BD.T,
        "out.caption_logits": outputs.caption_logits_KV,
        **{f"out.loss_{name}": part for name, part in parts.items()},
        **gradients(model),
    }


def clip4clip(golden: Golden) -> Values:
    """Both heads, over the same frame features."""
    inputs, found = golden.inputs, {}
    for head, (model, names) in frame_heads(golden).items():
        leaves = {k: inputs[k].detach().requires_grad_() for k in ("text_features", "frame_features")}
        mask, frames_BFD = inputs["video_mask"], leaves["frame_features"]
        mean_BD = model.pooled(model.in_context(frames_BFD, mask), mask)
        text_TD, video_BD = normalize(leaves["text_features"], dim=-1), normalize(mean_BD, dim=-1)
        scale = model.clip.logit_scale.exp()
        similarity = scale * text_TD @ video_BD.T
        (inputs["cotangent"] * similarity).sum().backward()
        square = min(similarity.shape)
        values = {
            "out.similarity": similarity,
            "out.video_mean": mean_BD,
            "out.loss_square": losses.contrastive(text_TD[:square], video_BD[:square], scale, [square]),
            **gradients(model, leaves, names),
        }
        if model.temporal is not None:
            values["out.temporal_output"] = model.temporal(frames_BFD, mask)
        found |= {key.replace(".", f".{head}.", 1): value for key, value in values.items()}
    return found


def frame_heads(golden: Golden) -> dict[str, tuple[TwoTower, dict[str, str]]]:
    """What CLIP4Clip puts behind the frame features, each with its parameters' names; no towers are in the file."""
    names = {f"temporal.{k}": k for k in golden.weights if k.startswith(("transformerClip.", "frame_position_"))}
    common = {"backbone": "from file", "num_frames": golden.sizes["frames"]}
    mean_pool = MeanPoolConfig(**common)
    seq_transf = SeqTransfConfig(**common, temporal={"layers": golden.sizes["layers"]})
    found = {}
    for head, config, keys in (("meanP", mean_pool, ()), ("seqTransf", seq_transf, names.values())):
        weights = {k: golden.weights[k] for k in ("logit_scale", *keys)}
        given = Golden(without_towers(golden.sizes), weights, golden.inputs)
        found[head] = build(given, config, names, is_partial=True), names
    return found


def without_towers(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes of towers that are not in the file: their widths matter, and the text's blocks where they are copied."""
    image = {"width": 8, "layers": 1, "heads": 1, "image": 8, "patch": 8}
    return {**image, **text_of_temporal(sizes, sizes["dim"]), "embed": sizes["dim"]}


def text_of_temporal(sizes: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Sizes of a text tower of which a temporal transformer, if the file has one, is a copy."""
    blocks = {"text_heads": sizes.get("heads", 1), "text_layers": sizes.get("layers", 1)}
    return {**blocks, "text_width": width, "ctx": sizes.get("positions", 8), "vocab": 2}


def vop(golden: Golden) -> Values:
    """Base VoP, with the text prompts split as released and with all of them before the words."""
    sizes, inputs, found = golden.sizes, golden.inputs, {}
    names = {"frame_prompts": "visual_prompts"}
    for suffix, end in ((sizes["text_suffix"], ""), (0, "_prefix_only")):
        config = VoPConfig(
            backbone="from file",
            num_frames=sizes["frames"],
            max_tokens=inputs["text"].shape[1],
            freeze_backbone=False,
            visual_prompts=sizes["visual_prompts"],
            text_prompts=sizes["text_prefix"] + sizes["text_suffix"],
            text_suffix=suffix,
        )
        model = build(golden, config, names)
        video = inputs["video"].detach().requires_grad_()
        text_TD, (vector_BD, frames_BFD, _) = model.encode_text(inputs["text"]).vector_TD, model.encode_video(video)
        mean_BD = model.pooled(frames_BFD)
        similarity = text_TD @ mean_BD.T  # of the released inference: the mean is not made unit length
        (inputs["cotangent"] * similarity).sum().backward()
        values = {
            "out.text_features": text_TD,
            "out.frame_features": normalize(frames_BFD, dim=-1),
            "out.video_features": mean_BD,
            "out.similarity": similarity,
            "out.similarity_cosine": text_TD @ vector_BD.T,
            **gradients(model, {"video": video}, names),
        }
        found |= {f"{key}{end}": value for key, value in values.items()}
    return found


def clipvip(golden: Golden) -> Values:
    sizes, inputs = golden.sizes, golden.inputs
    names = {name: f"visual.{name}" for name in ("added_cls", "temporal_embedding")}
    config = ClipVipConfig(backbone="from file", num_frames=sizes["frames"], num_proxies=sizes["proxies"])
    model = build(golden, config, names)
    assert isinstance(model, ClipVip)
    text_TD, video_BD = model.encode_text(inputs["text"]).vector_TD, model.encode_video(inputs["video"]).vector_BD
    other_BD = model.encode_video(inputs["video_other"]).vector_BD
    similarity = text_TD @ video_BD.T
    (inputs["cotangent"] * similarity).sum().backward()
    square = min(similarity.shape)
    loss = losses.contrastive(text_TD[:square], video_BD[:square], model.clip.logit_scale.exp(), [square])
    return {
        "out.text_features": text_TD,
        "out.video_features": video_BD,
        "out.similarity": similarity,
        "out.loss_square": 2 * loss,  # the official sum of both directions: losses.contrastive=2
        "out.last_hidden_state": model.tokens(inputs["video"]),
        "out.video_features_other": other_BD,
        **gradients(model, {"video": inputs["video"]}, names),
    }


def tokshift(golden: Golden) -> Values:
    """A plain ViT without text: no ln_pre, no projection, patches with a bias. The shift alone is compared too."""
    sizes, inputs = golden.sizes, golden.inputs
    absent = {"embed": sizes["width"], "text_width": 8, "text_heads": 1, "text_layers": 1, "vocab": 2, "ctx": 4}
    weights = dict(golden.weights)
    # What every patch adds is a part of its position; no projection is the one by the identity.
    weights["visual.positional_embedding"] = weights["visual.positional_embedding"].clone()
    weights["visual.positional_embedding"][1:] += weights.pop("visual.conv1.bias")
    weights["visual.proj"] = torch.eye(sizes["width"])
    config = TokenShiftConfig(
        backbone="from file", num_frames=sizes["frames"], div=sizes["fold_div"], unit_frames=False
    )
    model = build(
        Golden({**sizes, **absent}, weights, inputs),
        config,
        vision={"no_ln_pre": True, "norm_kwargs": {"eps": sizes["ln_eps"]}},
        clip={"quick_gelu": sizes["gelu"] != "exact"},
        is_partial=True,
    )
    assert isinstance(model, TokenShift)
    frames_BFD = model.frame_features(inputs["video"])
    (inputs["cotangent"] * frames_BFD).sum().backward()
    divs = [div for *_, div in sizes["shift_cases"]]
    return {
        "out.frame_features": frames_BFD,
        "out.video_features": model.pooled(frames_BFD),
        "out.block0_output": model.tokens(inputs["video"], 1),
        **{f"out.shift_y{i}": shift_cls(inputs[f"shift_x{i}"], div) for i, div in enumerate(divs)},
        **gradients(model, {"video": inputs["video"]}),
    }


TWO_TOWER: dict[str, Callable[[Golden], Values]] = {
    "promptswitch": promptswitch,
    "clip4clip": clip4clip,
    "vop": vop,
    "clipvip": clipvip,
    "tokshift": tokshift,
}
