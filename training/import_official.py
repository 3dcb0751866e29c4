"""Turn an official checkpoint into the folder of a run, as training.export writes one: config.yaml and best/.

    python -m training.import_official FILE OUTPUT [key.path=value ...]

FILE, local or on S3, tells by its names what it is:

    OpenAI's CLIP, a state dict or TorchScript      the preset zero_shot
    CLIP4Clip, meanP or seqTransf                   mean_pool, seq_transf
    Prompt Switch, its moving average if it has one prompt_switch
    VoP, the authors' port in ModelScope            vop, with the text prompts split 4 + 4 as released

The backbone is that of OpenAI's ViTs whose sizes it has; for others give model.backbone=FILE.json. What a checkpoint
does not tell is the preset's, and can be given like any key: model.num_frames=12.
"""

import json
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import config as configs
from common import logs, storage
from common.errors import ConfigError, exit_with
from training import models, weights
from training.config import PRESETS, TrainConfig
from training.models.clip_weights import OPENAI_SIZES, build_clip, plain_file

log = logging.getLogger(__name__)
USAGE = "python -m training.import_official FILE OUTPUT [key.path=value ...]"
OPENAI = ("ViT-B-32-quickgelu", "ViT-B-16-quickgelu", "ViT-L-14-quickgelu", "ViT-L-14-336-quickgelu")
Values = dict[str, Tensor]
Found = tuple[str, dict[str, Any], Values]  # preset, what the file tells of its keys, values by our names

# transformers' names of CLIP, which Prompt Switch has, and OpenAI's.
RENAMED = (
    (r"^clip\.(text|visual)_projection\.weight$", r"clip.\1_projection"),
    (r"^clip\.text_model\.embeddings\.(token_embedding\.weight)$", r"clip.\1"),
    (r"^clip\.text_model\.embeddings\.position_embedding\.weight$", "clip.positional_embedding"),
    (r"^clip\.text_model\.final_layer_norm\.", "clip.ln_final."),
    (r"^clip\.text_model\.encoder\.layers\.", "clip.transformer.resblocks."),
    (r"^clip\.vision_model\.embeddings\.class_embedding$", "clip.visual.class_embedding"),
    (r"^clip\.vision_model\.embeddings\.patch_embedding\.", "clip.visual.conv1."),
    (r"^clip\.vision_model\.embeddings\.position_embedding\.weight$", "clip.visual.positional_embedding"),
    (r"^clip\.vision_model\.pre_layrnorm\.", "clip.visual.ln_pre."),
    (r"^clip\.vision_model\.post_layernorm\.", "clip.visual.ln_post."),
    (r"^clip\.vision_model\.encoder\.layers\.", "clip.visual.transformer.resblocks."),
    (r"^clip\.vision_model\.encoder\.prompt_embedding$", "prompt_cube"),
    (r"^clip\.vision_model\.attn\.", "aggregation."),
    (r"(resblocks\.\d+)\.layer_norm([12])\.", r"\1.ln_\2."),
    (r"(resblocks\.\d+)\.mlp\.fc1\.", r"\1.mlp.c_fc."),
    (r"(resblocks\.\d+)\.mlp\.fc2\.", r"\1.mlp.c_proj."),
    (r"(resblocks\.\d+)\.self_attn\.", r"\1.attn."),
    (r"^caption_transformer\.", "captioner.decoder."),
    (r"^caption_(prenorm|head)\.", r"captioner.\1."),
)


def import_official(file: str, output: str, overrides: Sequence[str] = ()) -> str:
    """Write the run's folder; returns its URL.

    Raises:
        ConfigError, StorageError: the file can't be read, is of no known kind, or its values don't fit the model.
    """
    output = storage.absolute(output).rstrip("/")
    preset, told, values = _kind(_read(file), file)
    backbone = configs.parse_overrides(overrides).get("model.backbone") or _backbone(values, file)
    folder, _, name = output.rpartition("/")
    told |= {"run.name": name, "run.storage": folder, "model.pretrained": None, "model.backbone": backbone}
    config = configs.load(
        TrainConfig, preset, [f"{k}={json.dumps(v)}" for k, v in told.items()] + [*overrides], PRESETS
    )
    model = models.build(config.model, load=False)
    _check(values, model.state_dict(), f"{file} does not fit {config.model.name} on {backbone}")
    model.load_state_dict(values)
    weights.save_best(output, model, 0, {})
    storage.publish_bytes(configs.dump(config).encode(), storage.join(output, "config.yaml"))
    log.info("%s is %s on %s", file, preset, backbone)
    return output


def _read(file: str) -> Values:
    """All tensors of a checkpoint in full precision. Nothing but tensors and plain containers is ever unpickled."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        storage.download(file, path)
        try:
            state = torch.load(plain_file(path, Path(folder)), map_location="cpu", weights_only=True)
        except Exception as error:  # whatever torch raises for what is no checkpoint
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"{file} cannot be read as tensors and plain data: {reason}") from None
    for key in ("state_dict_ema", "state_dict"):
        if isinstance(state, dict) and key in state:
            state = state[key]
            break
    if not isinstance(state, dict):
        raise ConfigError(f"{file} holds no state dict, but a {type(state).__name__}")
    tensors = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, Tensor)}
    unread = ("position_ids", *OPENAI_SIZES)  # numbers that are no weights
    return {k: v.float() for k, v in tensors.items() if k.split(".")[-1] not in unread}


def _kind(state: Values, file: str) -> Found:
    kinds: tuple[tuple[str, Callable[[Values], Found]], ...] = (
        ("clip.vision_model.encoder.prompt_embedding", _prompt_switch),
        ("visual_prompt_learner.visual_prompts", _vop),
        ("clip.visual.conv1.weight", _clip4clip),
        ("visual.conv1.weight", _openai),
    )
    for name, read in kinds:
        if name in state:
            return read(state)
    raise ConfigError(
        f"{file} is no checkpoint of OpenAI's CLIP, CLIP4Clip, Prompt Switch or VoP: it has none of "
        f"{', '.join(name for name, _ in kinds)}"
    )


def _openai(state: Values) -> Found:
    return "zero_shot", {}, {f"clip.{name}": value for name, value in state.items()}


def _clip4clip(state: Values) -> Found:
    head = ("transformerClip.", "frame_position_embeddings.")
    values = {f"temporal.{name}" if name.startswith(head) else name: value for name, value in state.items()}
    layers = _count(state, r"transformerClip\.resblocks\.(\d+)\.")
    return ("seq_transf", {"model.temporal.layers": layers}, values) if layers else ("mean_pool", {}, values)


def _prompt_switch(state: Values) -> Found:
    """Of transformers' attention, queries, keys and values are apart; its projections are the other way round."""
    values: Values = {}
    for name, value in state.items():
        for pattern, ours in RENAMED:
            name = re.sub(pattern, ours, name)
        values[name] = value
    for name in [n for n in values if n.endswith(("attn.q_proj.weight", "attn.q_proj.bias"))]:
        parts = [name.replace("q_proj.", f"{part}_proj.") for part in "qkv"]
        if all(part in values for part in parts):
            values[name.replace("q_proj.", "in_proj_")] = torch.cat([values.pop(part) for part in parts])
    for theirs, ours in (
        ("clip.text_projection", "clip.text_projection"),
        ("clip.visual_projection", "clip.visual.proj"),
    ):
        if theirs in values:
            values[ours] = values.pop(theirs).T.contiguous()
    size, layers = len(values["prompt_cube"]), _count(values, r"captioner\.decoder\.layers\.(\d+)\.")
    told = {"model.num_prompts": size, "model.num_frames": size, "losses.caption": 0.5 if layers else 0.0}
    return "prompt_switch", {**told, "model.captioner": {"layers": layers} if layers else None}, values


def _vop(state: Values) -> Found:
    """The port's encoders hold CLIP's modules again, under names of their own."""
    values = {}
    for name, value in state.items():
        original = re.sub(r"^(image_encoder\.|text_encoder\.)", lambda m: PORT[m[0]], name)
        if original != name and original in state and torch.equal(state[original], value):
            continue
        values[name] = value
    visual = values.pop("visual_prompt_learner.visual_prompts")
    values["frame_prompts"] = visual[:, 0] if visual.ndim == 4 else visual
    told = {"model.visual_prompts": values["frame_prompts"].shape[1], "model.text_prompts": 0}
    if "text_prompt_learner.text_prompts" in values:
        values["text_prompts"] = values.pop("text_prompt_learner.text_prompts")
        count = values["text_prompts"].shape[1]
        told |= {"model.text_prompts": count, "model.text_suffix": count // 2}
        told["model.max_tokens"] = len(values.get("clip.positional_embedding", ())) - count
    return "vop", told, values


PORT = {"image_encoder.": "clip.visual.", "text_encoder.": "clip."}


def _count(state: Values, pattern: str) -> int:
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def _backbone(values: Values, file: str) -> str:
    """Of OpenAI's ViTs that one whose sizes the values have."""
    for name in OPENAI:
        with torch.device("meta"):
            clip = build_clip(name, None)
        if all(values.get(f"clip.{k}", v).shape == v.shape for k, v in clip.state_dict().items()):
            return name
    raise ConfigError(
        f"the towers of {file} have the sizes of none of {', '.join(OPENAI)}: write them in a .json like those in "
        "training/models/backbones, and give model.backbone=FILE.json"
    )


def _check(values: Values, own: Values, what: str) -> None:
    reasons = [f"{name} is missing" for name in own.keys() - values.keys()]
    reasons += [f"{name} has no place" for name in values.keys() - own.keys()]
    reasons += [
        f"{name} is {list(values[name].shape)} instead of {list(own[name].shape)}"
        for name in own.keys() & values.keys()
        if values[name].shape != own[name].shape
    ]
    if reasons:
        more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        raise ConfigError(f"{what}: {'; '.join(sorted(reasons)[:3])}{more}")


def main() -> int:
    arguments = [a.removeprefix("output=") for a in sys.argv[1:]]
    if "--help" in arguments or "-h" in arguments:
        print((__doc__ or "").strip())
        return 0
    if len(arguments) < 2:
        raise ConfigError(f"expected a file and an output, got {len(arguments)} arguments: {USAGE}")
    logs.setup()
    print(import_official(arguments[0], arguments[1], arguments[2:]))
    return 0


if __name__ == "__main__":
    exit_with(main)
