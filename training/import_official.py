"""Turn a checkpoint of an official implementation into a run, to evaluate, embed, or start training from.

    python -m training.import_official PRESET CHECKPOINT OUTPUT [key.path=value ...]

CHECKPOINT is a file or s3:// URL that OpenAI's CLIP, PromptSwitch, X-Pool, CLIP4Clip, X-CLIP, TS2-Net or VoP's port
in ModelScope has written; PRESET and overrides say what model it is (docs/methods.md: "Official checkpoints").
OUTPUT/config.yaml and OUTPUT/best/model.safetensors are what `training.evaluate` and `retrieval` need of a run. Every
tensor must find its place: what is missing or left over is an error.
"""

import re
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from common import config as configs
from common import logs, storage
from common.errors import ConfigError, exit_with
from training import models, weights
from training.config import PRESETS, TrainConfig

USAGE = "python -m training.import_official PRESET CHECKPOINT OUTPUT [key.path=value ...]"
Values = dict[str, Tensor]
# Copies of what is elsewhere in the file, constants, and the head that CLIP4Clip makes and does not use.
LEFT_OUT = re.compile(
    r"(image_encoder|text_encoder|pool_frames_test|cross|similarity_dense)\."
    r"|.*\.position_ids$|(clip\.)?(input_resolution|context_length|vocab_size)$"
)
# In this order; the first of a group that matches. Names after `clip.` are OpenAI's, which are ours too.
NAMES = (
    # Prompt Switch and X-Pool: CLIP as Hugging Face's transformers call it
    (r"^clip\.vision_model\.encoder\.prompt_embedding$", "prompt_cube"),
    (r"^clip\.vision_model\.attn\.", "aggregation."),
    (r"^clip\.vision_model\.embeddings\.class_embedding$", "clip.visual.class_embedding"),
    (r"^clip\.vision_model\.embeddings\.patch_embedding\.", "clip.visual.conv1."),
    (r"^clip\.vision_model\.embeddings\.position_embedding\.weight$", "clip.visual.positional_embedding"),
    (r"^clip\.vision_model\.pre_layrnorm\.", "clip.visual.ln_pre."),
    (r"^clip\.vision_model\.post_layernorm\.", "clip.visual.ln_post."),
    (r"^clip\.vision_model\.encoder\.layers\.", "clip.visual.transformer.resblocks."),
    (r"^clip\.visual_projection\.weight$", "clip.visual.proj"),
    (r"^clip\.text_model\.embeddings\.token_embedding\.", "clip.token_embedding."),
    (r"^clip\.text_model\.embeddings\.position_embedding\.weight$", "clip.positional_embedding"),
    (r"^clip\.text_model\.final_layer_norm\.", "clip.ln_final."),
    (r"^clip\.text_model\.encoder\.layers\.", "clip.transformer.resblocks."),
    (r"^clip\.text_projection\.weight$", "clip.text_projection"),
    (r"^caption_prenorm\.", "captioner.prenorm."),
    (r"^caption_transformer\.", "captioner.decoder."),
    (r"^caption_head\.", "captioner.head."),
    (r"^pool_frames\.", "scorer."),
    # CLIP4Clip, X-CLIP, TS2-Net
    (r"^(transformerClip|frame_position_embeddings)\.", r"temporal.\1."),
    (r"^((global|local|frame|word)_(mat|logit)_weight2?)$", r"scorer.\1"),
    (r"^visual_token_selector\.score_predictor\.", "predictor."),
    # VoP
    (r"^visual_prompt_learner\.visual_prompts$", "frame_prompts"),
    (r"^text_prompt_learner\.text_prompts$", "text_prompts"),
    # OpenAI's own CLIP
    (r"^(visual|transformer|token_embedding|ln_final)\.", r"clip.\1."),
    (r"^(positional_embedding|text_projection|logit_scale)$", r"clip.\1"),
)
IN_A_BLOCK = {"layer_norm": "ln_", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "self_attn.": "attn."}


def import_official(config: TrainConfig, checkpoint: str, output: str) -> str:
    """Write the run OUTPUT; returns its URL. Raises ConfigError, StorageError."""
    output = storage.absolute(output)
    model = models.build(config.model.model_copy(update={"pretrained": None}))
    own = model.state_dict()
    official = renamed(read(checkpoint))
    towers = {name.removeprefix("towers."): name for name in own}
    values = {towers.get(name, name): value for name, value in official.items()}
    for what, names in (("lacks", own.keys() - values.keys()), ("also has", values.keys() - own.keys())):
        if names:
            some = ", ".join(sorted(names)[:3])
            raise ConfigError(f"{checkpoint} {what} {some} ({len(names)} in all): choose a preset or model.* that fit")
    for name, value in values.items():
        if value.numel() != own[name].numel():
            sizes = f"{list(value.shape)}, not {list(own[name].shape)}"
            raise ConfigError(f"{checkpoint} has {name} of size {sizes}: choose a preset or model.* that fit")
    model.load_state_dict({name: value.float().reshape(own[name].shape) for name, value in values.items()})
    weights.save_best(output, model, 0, {})
    # Last, as it makes the folder a run's.
    storage.publish_bytes(configs.dump(config).encode(), storage.join(output, "config.yaml"))
    return output


def read(checkpoint: str) -> Values:
    """The weights in a file, its moving average if it has one: that is what its code evaluates."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(checkpoint).expanduser()
        if storage.is_s3(checkpoint):
            path = Path(folder) / "checkpoint"
            storage.download(checkpoint, path)
        try:
            is_script = any(n.endswith("/constants.pkl") for n in zipfile.ZipFile(path).namelist())
        except zipfile.BadZipFile:  # torch.save before 1.6
            is_script = False
        except FileNotFoundError:
            raise ConfigError(f"{checkpoint} does not exist: give the checkpoint's file or s3:// URL") from None
        if is_script:
            values: Values = torch.jit.load(path, map_location="cpu").state_dict()
            return values
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle's and torch's, of many kinds
            raise ConfigError(f"{checkpoint} cannot be read: {str(error).splitlines()[0]}") from None
    for key in ("state_dict_ema", "state_dict"):
        content = content.get(key, content)
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def renamed(official: Values) -> Values:
    """Under our names, of the towers without `towers.`; projections as matrices to multiply by from the right."""
    found: Values = {}
    parts: dict[str, Values] = {}
    for name, value in official.items():
        name = name.removeprefix("module.")
        if LEFT_OUT.match(name):
            continue
        is_huggingface = name.startswith(("clip.vision_model.", "clip.text_model."))
        if name in ("clip.visual_projection.weight", "clip.text_projection.weight"):
            value = value.T
        for pattern, ours in NAMES:
            name, changes = re.subn(pattern, ours, name)
            if changes:
                break
        if is_huggingface and ".resblocks." in name:
            for theirs, ours in IN_A_BLOCK.items():
                name = name.replace(theirs, ours)
            if of_heads := re.fullmatch(r"(.*\.attn\.)([qkv])_proj\.(weight|bias)", name):
                block, which, kind = of_heads.groups()
                parts.setdefault(f"{block}in_proj_{kind}", {})[which] = value
                continue
        found[name] = value
    return found | {name: torch.cat([values[which] for which in "qkv"]) for name, values in parts.items()}


def parse(argv: Sequence[str]) -> tuple[TrainConfig, str, str]:
    """PRESET CHECKPOINT OUTPUT and overrides → configuration, checkpoint, output."""
    given = [a for a in argv if "=" not in a]
    if len(given) != 3:
        raise ConfigError(f"expected a preset, a checkpoint and an output, got {len(given)} arguments: {USAGE}")
    preset, checkpoint, output = given
    folder, _, name = storage.absolute(output).rstrip("/").rpartition("/")
    overrides = [f"run.storage={folder}", f"run.name={name}", *(a for a in argv if "=" in a)]
    return configs.load(TrainConfig, preset, overrides, PRESETS), checkpoint, output


def main() -> int:
    if {"--help", "-h"} & set(sys.argv):
        print((__doc__ or "").strip())
        return 0
    logs.setup()
    print(import_official(*parse(sys.argv[1:])))
    return 0


if __name__ == "__main__":
    exit_with(main)
