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
from training.model_config import PromptSwitchConfig, TwoTowerConfig
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
) -> TwoTower:
    """The registered method at the file's sizes, with the file's weights.

    Args:
        vision, clip: changes of the image tower's and of CLIP's configuration.
        renamed: makes our names and shapes of the file's.
    """
    tower = clip_from_config(_clip_sizes(golden.sizes, vision or {}, clip or {}))
    model = models.MODELS[config.name](config, tower)  # type: ignore[attr-defined]
    own = model.state_dict()
    model.load_state_dict({f"clip.{k}" if f"clip.{k}" in own else k: v for k, v in renamed(golden.weights).items()})
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


METHODS: dict[str, Callable[[Golden], Values]] = {
    "promptswitch": promptswitch,
}
