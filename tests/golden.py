"""What each reference file holds, said with our methods: method → every `out.*` and `grad.*` that we find for it.

An entry configures the registered method by the file's sizes, names its weights as the file does, and runs it. No model
arithmetic: what is computed here is only what a file's description (shared/golden/README.md) adds to a model, such as
the sum whose derivative its gradients are.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from training import losses, models
from training.model_config import MeanPoolConfig, PromptSwitchConfig, SeqTransfConfig, TwoTowerConfig, VoPConfig
from training.models.clip import clip_from_config
from training.models.two_tower import Outputs, TwoTower

Values = dict[str, Tensor]


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
    vision: Mapping[str, object] | None = None,
    clip: Mapping[str, object] | None = None,
    renamed: Callable[[Values], Values] = dict,
    is_head: bool = False,
) -> TwoTower:
    """The registered method at the file's sizes, with the file's weights.

    Args:
        vision, clip: changes of the image tower's and of CLIP's configuration.
        renamed: makes our names and shapes of the file's.
        is_head: the file holds no towers.
    """
    tower = clip_from_config(_clip_sizes(golden.sizes, vision or {}, clip or {}))
    model = models.MODELS[config.name](config, tower)  # type: ignore[attr-defined]
    own = model.state_dict()
    given = {f"clip.{k}" if f"clip.{k}" in own else k: v for k, v in renamed(golden.weights).items()}
    towers = {k: v for k, v in own.items() if k.startswith("clip.")} if is_head else {}
    model.load_state_dict({**towers, **given})
    return model.to(golden.dtype)


def _clip_sizes(sizes: Mapping[str, Any], vision: Mapping[str, object], clip: Mapping[str, object]) -> dict[str, Any]:
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


def gradients(model: TwoTower, inputs: Iterable[tuple[str, Tensor]] = ()) -> Values:
    """`grad.*` of every parameter, under CLIP's own names, and of the inputs."""
    named = [(name.removeprefix("clip."), p) for name, p in model.named_parameters()]
    return {f"grad.{name}": value.grad for name, value in (*named, *inputs) if value.grad is not None}


def objective(outputs: Outputs, tokens: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Both losses of Prompt Switch, of one whole batch in one process, written down as the paper has them."""
    assert outputs.video.vector_BD is not None
    contrastive = losses.contrastive(
        outputs.text.vector_TD, outputs.video.vector_BD, outputs.logit_scale, [len(tokens)]
    )
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
    assert outputs.video.vector_BD is not None and outputs.caption_logits_KV is not None
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
    """Both heads, from the same frame features; the towers are not in the file."""
    sizes, inputs = golden.sizes, golden.inputs
    text = {"embed": sizes["dim"], "text_width": sizes["dim"], "text_heads": sizes["heads"], "vocab": 2}
    tower = {"width": 8, "layers": 1, "heads": 1, "image": 8, "patch": 8}
    golden = golden._replace(sizes={**tower, **text, "text_layers": sizes["layers"], "ctx": sizes["positions"]})
    common = {"backbone": "from file", "num_frames": sizes["frames"]}
    heads: dict[str, TwoTowerConfig] = {
        "meanP": MeanPoolConfig(**common),
        "seqTransf": SeqTransfConfig(**common, temporal={"layers": sizes["layers"]}),
    }
    found = {}
    for name, config in heads.items():
        ours = {"logit_scale": "logit_scale"}
        if name == "seqTransf":
            ours |= {k: f"temporal.{k}" for k in golden.weights if k != "logit_scale"}
        model = build(golden, config, renamed=lambda w, ours=ours: {new: w[k] for k, new in ours.items()}, is_head=True)
        frames = inputs["frame_features"].detach().requires_grad_()
        texts = inputs["text_features"].detach().requires_grad_()
        mean_BD = model.pooled(model.in_context(frames, inputs["video_mask"]), inputs["video_mask"])
        scale, text_TD, video_BD = model.clip.logit_scale.exp(), normalize(texts, dim=-1), normalize(mean_BD, dim=-1)
        similarity = scale * text_TD @ video_BD.T
        (inputs["cotangent"] * similarity).sum().backward()
        square = min(similarity.shape)
        values = {
            "out.similarity": similarity,
            "out.video_mean": mean_BD,
            "out.loss_square": losses.contrastive(text_TD[:square], video_BD[:square], scale, [square]),
            **gradients(model, [("frame_features", frames), ("text_features", texts)]),
        }
        if model.temporal is not None:
            values["out.temporal_output"] = model.temporal(frames, inputs["video_mask"])
        for key, value in values.items():
            kind, _, rest = key.partition(".")
            found[f"{kind}.{name}.{rest.removeprefix('temporal.')}"] = value
    return found


def vop(golden: Golden) -> Values:
    """Base VoP, with the text prompts split as released and all before the words."""
    sizes, inputs, found = golden.sizes, golden.inputs, {}

    def ours(weights: Values) -> Values:
        values = dict(weights)
        return values | {"frame_prompts": values.pop("visual_prompts").squeeze(1)}

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
        model = build(golden, config, renamed=ours)
        video = inputs["video"].detach().requires_grad_()
        text_TD, found_video = model.encode_text(inputs["text"]).vector_TD, model.encode_video(video)
        assert found_video.vector_BD is not None
        mean_BD = model.pooled(found_video.frames_BFD)
        similarity = text_TD @ mean_BD.T  # of the released inference: the mean is not made unit length
        (inputs["cotangent"] * similarity).sum().backward()
        values = {
            "out.text_features": text_TD,
            "out.frame_features": normalize(found_video.frames_BFD, dim=-1),
            "out.video_features": mean_BD,
            "out.similarity": similarity,
            "out.similarity_cosine": text_TD @ found_video.vector_BD.T,
            **gradients(model, [("video", video)]),
        }
        values["grad.visual_prompts"] = values.pop("grad.frame_prompts")
        found |= {f"{key}{end}": value for key, value in values.items()}
    return found


METHODS: dict[str, Callable[[Golden], Values]] = {
    "promptswitch": promptswitch,
    "clip4clip": clip4clip,
    "vop": vop,
}
