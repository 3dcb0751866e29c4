"""Compare a method with reference tensors: `python -m tests.parity FILE.npz ...`.

The file's name up to the first `_` or `.` names the method; every size is read from the file. Prints the largest error
per tensor in float64 and in float32 and exits 1 above the tolerances (float64: 1e-9 of the tensor's maximum, at least
of 1; float32: outputs 2e-5 + 1e-4 relative, gradients 1e-4 of the tensor's maximum).
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError, exit_with
from training import losses, models
from training.config import PromptSwitchConfig, TwoTowerConfig
from training.models.captioner import counted_positions
from training.models.clip import clip_from_config
from training.models.two_tower import Outputs, TwoTower

Values = Mapping[str, Tensor]


def promptswitch_config(sizes: Mapping[str, Any]) -> PromptSwitchConfig:
    return PromptSwitchConfig(
        backbone="from file",
        num_frames=sizes["frames"],
        num_prompts=sizes["prompts"],
        captioner={"layers": sizes["cap_layers"]},  # type: ignore[arg-type]
    )


CONFIGS: dict[str, tuple[str, Callable[[Mapping[str, Any]], TwoTowerConfig]]] = {
    "promptswitch": ("prompt_switch", promptswitch_config),
}


def load_model(method: str, sizes: Mapping[str, Any], values: Values, dtype: torch.dtype) -> TwoTower:
    """The registered method at the file's sizes, with the file's weights."""
    if method not in CONFIGS:
        raise ConfigError(f"no parity test for {method!r}; known: {', '.join(sorted(CONFIGS))}")
    name, configure = CONFIGS[method]
    clip = clip_from_config(
        {
            "embed_dim": sizes["embed"],
            "quick_gelu": True,
            "vision_cfg": {
                "image_size": sizes["image"],
                "patch_size": sizes["patch"],
                "width": sizes["width"],
                "layers": sizes["layers"],
                "head_width": sizes["width"] // sizes["heads"],
            },
            "text_cfg": {
                "context_length": sizes["ctx"],
                "vocab_size": sizes["vocab"],
                "width": sizes["text_width"],
                "heads": sizes["text_heads"],
                "layers": sizes["text_layers"],
            },
        }
    )
    model = models.MODELS[name](configure(sizes), clip)
    own = model.state_dict()
    weights = {f"clip.{k}" if f"clip.{k}" in own else k: v for k, v in values.items()}
    model.load_state_dict(weights)
    return model.to(dtype)


def run(model: TwoTower, inputs: Values, dtype: torch.dtype) -> dict[str, Tensor]:
    """Everything the file may hold: `out.*` and the gradient of every parameter as `grad.*`."""
    video, tokens = inputs["video"].to(dtype), inputs["text"]
    outputs = model(video, tokens)
    weights = inputs["token_weight"].to(dtype)
    parts = objective(outputs, tokens, weights)
    torch.stack(list(parts.values())).sum().backward()
    assert outputs.video.vector_BD is not None and outputs.caption_logits_KV is not None
    found = {
        "out.text_features": outputs.text.vector_TD,
        "out.frame_features": torch.nn.functional.normalize(outputs.video.frames_BFD, dim=-1),
        "out.video_features": outputs.video.vector_BD,
        "out.similarity": outputs.text.vector_TD @ outputs.video.vector_BD.T,
        "out.caption_logits": outputs.caption_logits_KV,
        **{f"out.loss_{name}": part for name, part in parts.items()},
    }
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            found[f"grad.{name.removeprefix('clip.')}"] = parameter.grad
    return {k: v.detach() for k, v in found.items()}


def objective(outputs: Outputs, tokens: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Both losses of one whole batch in one process, written down as the paper has them."""
    assert outputs.video.vector_BD is not None
    contrastive = losses.contrastive(
        outputs.text.vector_TD, outputs.video.vector_BD, outputs.logit_scale, [len(tokens)]
    )
    caption = losses.caption(outputs, weights, losses.caption_total(tokens, weights))
    return {"contrastive": contrastive, "caption": 0.5 * caption}


def allowed(key: str, reference: Tensor, dtype: torch.dtype) -> Tensor:
    largest = reference.abs().max()
    if dtype == torch.float64:
        return 1e-9 * largest.clamp(min=1)
    return 1e-4 * largest if key.startswith("grad.") else 2e-5 + 1e-4 * reference.abs()


def compare(path: Path) -> bool:
    """Print a line per tensor; True if all are within tolerance."""
    with np.load(path, allow_pickle=False) as file:
        sizes = json.loads(str(file["config"]))
        values = {k: torch.from_numpy(np.asarray(file[k])) for k in file.files if k != "config"}
    inputs = {k.removeprefix("in."): v for k, v in values.items() if k.startswith("in.")}
    weights = {k.removeprefix("w."): v for k, v in values.items() if k.startswith("w.")}
    method = path.name.split(".")[0].split("_")[0]
    references = {k: v for k, v in values.items() if k.startswith(("out.", "grad."))}
    # Positions after the end token hold whatever the producing run padded with.
    references["out.caption_logits"] = references["out.caption_logits"][counted_positions(inputs["text"])]
    fits = True
    for dtype in (torch.float64, torch.float32):
        found = run(load_model(method, sizes, weights, dtype), inputs, dtype)
        for key, reference in references.items():
            error = (found[key].double() - reference).abs()
            ok = bool((error <= allowed(key, reference, dtype)).all())
            fits &= ok
            name = str(dtype).removeprefix("torch.")
            print(f"{path.name}  {name}  {key:<36} max error {error.max():.1e}  {'ok' if ok else 'TOO LARGE'}")
    return fits


def main() -> int:
    if not sys.argv[1:]:
        raise ConfigError("no file given: python -m tests.parity FILE.npz ...")
    results = [compare(Path(name)) for name in sys.argv[1:]]
    print(f"{sum(results)} of {len(results)} files within tolerance")
    return 0 if all(results) else 1


if __name__ == "__main__":
    exit_with(main)
