"""The only file that touches open_clip's internals: what the methods need from a CLIP with a ViT image tower.

Shapes: N images, C channels, H height, W width (of images) or H heads of width d, L tokens, D width, T texts, E joint
width.
"""

import copy
import functools
import gzip
import importlib.util
import logging
import re
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from common import storage
from common.errors import ConfigError, ProjectError

log = logging.getLogger(__name__)
BACKBONES = Path(__file__).parent / "backbones"
FULL_VOCABULARY = 49408
OPENAI_SIZES = ("input_resolution", "context_length", "vocab_size")  # numbers beside the weights in OpenAI's files
Hook = Callable[[Tensor], Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
_torchvision_ops: torch.library.Library | None = None


def _declare_torchvision_ops() -> None:
    """Let a torchvision built for CUDA import beside a CPU torch.

    PyPI's torchvision has no CPU build; its import annotates two operators that only its CUDA library would
    register. Declaring their schemas is enough: what needs the compiled code still says that it is missing.
    """
    global _torchvision_ops
    spec = importlib.util.find_spec("torchvision")
    if torch.version.cuda or torch.version.hip or spec is None or not spec.origin or _torchvision_ops is not None:
        return
    for library in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(library))
            return
        except OSError:
            continue
    _torchvision_ops = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        _torchvision_ops.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_declare_torchvision_ops()
import open_clip  # noqa: E402 (torchvision, which it imports, needs the declaration above)
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer  # noqa: E402


def build_clip(backbone: str, pretrained: str | None) -> open_clip.CLIP:
    """A CLIP by open_clip name, by a name in `backbones/`, or by the path of a model config.

    Args:
        pretrained: open_clip tag, local path or s3:// URL; None gives random weights.

    Raises:
        ConfigError: the name is unknown, the weights don't fit, or the towers are not of a supported kind.
    """
    name = _register(backbone)
    if pretrained is None:
        logging.disable(logging.WARNING)  # open_clip warns that the weights are random, as asked
    try:
        with tempfile.TemporaryDirectory() as folder:
            weights = _local_weights(pretrained, name, Path(folder))
            model = open_clip.create_model(name, pretrained=weights)
    except ProjectError:
        raise
    except Exception as error:  # whatever torch.load, a hub client or load_state_dict raise
        if pretrained is None:
            raise
        reason = str(error).strip().splitlines()[0]
        raise ConfigError(f"model.pretrained={pretrained} cannot be loaded into {backbone}: {reason}") from None
    finally:
        logging.disable(logging.NOTSET)
    if not isinstance(model, open_clip.CLIP):
        raise ConfigError(f"model.backbone={backbone}: only CLIP's own text tower is supported, not a custom one")
    visual = model.visual
    if not isinstance(visual, VisionTransformer) or visual.attn_pool is not None or visual.pool_type != "tok":
        raise ConfigError(
            f"model.backbone={backbone}: only a ViT image tower that reads out its CLS token is supported"
        )
    if not all(isinstance(block, ResidualAttentionBlock) for block in visual.transformer.resblocks):
        raise ConfigError(f"model.backbone={backbone}: its blocks are not plain pre-norm attention blocks")
    model.logit_scale.data.clamp_(max=4.6052)
    return model


@functools.lru_cache(maxsize=8)
def tokenizer(backbone: str, max_tokens: int, is_padded: bool = False) -> Callable[[list[str]], Tensor]:
    """A function from sentences to int64 ids TL, padded with zeros to the longest of them, or to `max_tokens`.

    Start and end tokens are included; a longer sentence is cut to `max_tokens`, its end token kept.
    """
    encode = _tokenizer(backbone, max_tokens)

    def tokenize(texts: list[str]) -> Tensor:
        tokens_TL = encode(texts)
        return tokens_TL if is_padded else tokens_TL[:, : int(lengths(tokens_TL).max())]

    return tokenize


def detokenizer(backbone: str) -> Callable[[list[int]], str]:
    """A function from ids, without start and end, to the sentence, in lower case as CLIP's vocabulary has it."""
    decode = _tokenizer(backbone, 77).decode
    # What the tokenizer takes apart: "it 's", "1 0".
    return lambda ids: re.sub(r" (?=[.,:;!?'])|(?<=\d) (?=\d)", "", decode(ids)).strip()


def _tokenizer(backbone: str, max_tokens: int) -> Any:
    """open_clip's own, over as much of the vocabulary as the backbone has."""
    name = _register(backbone)
    config = open_clip.get_model_config(name)
    assert config is not None
    context = min(max_tokens, config["text_cfg"].get("context_length", 77))
    with tempfile.TemporaryDirectory() as folder:
        size = config["text_cfg"].get("vocab_size", FULL_VOCABULARY)
        smaller = {"bpe_path": _first_merges(Path(folder), size)} if size < FULL_VOCABULARY else {}
        return open_clip.get_tokenizer(name, context_length=context, **smaller)


def frequent_ids(backbone: str, words: Sequence[str]) -> list[int]:
    """Ids of the words that are one token, and of the start and end tokens."""
    tokens_TL = tokenizer(backbone, 8)(list(words))
    single = tokens_TL[lengths(tokens_TL) == 3]
    return sorted(set(single[:, :3].flatten().tolist()))


def lengths(tokens_TL: Tensor) -> Tensor:
    """Ids up to and including the end token, T. The end token is the largest id of CLIP's vocabulary."""
    return tokens_TL.argmax(dim=-1) + 1


def normalize_pixels(visual: VisionTransformer, frames: Tensor) -> Tensor:
    """uint8 (or already normalised float) ...CHW → float, with the tower's mean and standard deviation."""
    if frames.is_floating_point():
        return frames
    dtype = visual.conv1.weight.dtype
    mean = torch.tensor(getattr(visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN, dtype=dtype)
    std = torch.tensor(getattr(visual, "image_std", None) or open_clip.OPENAI_DATASET_STD, dtype=dtype)
    scale, shift = 1 / (255 * std), mean / std
    # Without waiting for the device.
    scale_C11, shift_C11 = (v[:, None, None].to(frames.device, non_blocking=True) for v in (scale, shift))
    return frames.to(dtype) * scale_C11 - shift_C11


def image_size_of(backbone: str) -> int:
    """Pixels of a frame's side, without building the model."""
    config = open_clip.get_model_config(_register(backbone))
    assert config is not None
    return int(config["vision_cfg"]["image_size"])


def image_tokens(visual: VisionTransformer, pixels_NCHW: Tensor) -> Tensor:
    """[CLS, patches] with positions, after the pre-LayerNorm: NLD."""
    return visual._embeds(pixels_NCHW)


def raw_image_tokens(visual: VisionTransformer, pixels_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """CLS 1D and patches NLD with positions, before the pre-LayerNorm."""
    patches_NLD = visual.conv1(pixels_NCHW).flatten(2).transpose(1, 2)
    positions_LD = visual.positional_embedding.to(patches_NLD.dtype)
    return visual.class_embedding.to(patches_NLD.dtype) + positions_LD[:1], patches_NLD + positions_LD[1:]


def layers(tower: VisionTransformer | open_clip.CLIP) -> int:
    """The number of blocks of an image tower, or of a CLIP's text tower."""
    return len(tower.transformer.resblocks)


def run_block(
    tower: VisionTransformer | open_clip.CLIP,
    layer: int,
    x_NLD: Tensor,
    mix: Hook | None = None,
    *,
    shift: Hook | None = None,
    attend: Attend | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """One pre-norm block of an image tower, or of a CLIP's text tower.

    Its activations are made again in the backward pass if the tower's `grad_checkpointing` is set.

    Args:
        mix: changes what the attention reads, after the first LayerNorm, and nothing else.
        shift: changes the residual stream itself, before the attention and again before the MLP.
        attend: computes the heads' outputs from their queries, keys and values, each NHLd; None = full attention.
        mask: added to the attention's logits, LL.
    """
    block = tower.transformer.resblocks[layer]
    if tower.transformer.grad_checkpointing and torch.is_grad_enabled():
        again: Tensor = checkpoint(_run_block, block, x_NLD, mix, shift, attend, mask, use_reentrant=False)
        return again
    return _run_block(block, x_NLD, mix, shift, attend, mask)


def _run_block(
    block: ResidualAttentionBlock,
    x_NLD: Tensor,
    mix: Hook | None = None,
    shift: Hook | None = None,
    attend: Attend | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    x_NLD = x_NLD if shift is None else shift(x_NLD)
    y_NLD = block.ln_1(x_NLD)
    y_NLD = y_NLD if mix is None else mix(y_NLD)
    y_NLD = block.attention(y_NLD, attn_mask=mask) if attend is None else _attention(block.attn, y_NLD, attend)
    x_NLD = x_NLD + block.ls_1(y_NLD)
    x_NLD = x_NLD if shift is None else shift(x_NLD)
    return x_NLD + block.ls_2(block.mlp(block.ln_2(x_NLD)))


def _attention(attention: nn.MultiheadAttention, y_NLD: Tensor, attend: Attend) -> Tensor:
    """Self-attention with its own weights, whose pattern `attend` decides."""
    qkv_NLE = linear(y_NLD, attention.in_proj_weight, attention.in_proj_bias)
    q_NHLd, k_NHLd, v_NHLd = qkv_NLE.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return attention.out_proj(attend(q_NHLd, k_NHLd, v_NHLd).transpose(1, 2).flatten(2))


class TextBlocks(nn.Module):
    """A copy of the first blocks of the text tower, to go on training over something else than words."""

    def __init__(self, clip: open_clip.CLIP, count: int, ln_eps: float) -> None:
        super().__init__()
        self.resblocks = copy.deepcopy(clip.transformer.resblocks[:count])
        for block in self.resblocks:
            block.ln_1.eps = block.ln_2.eps = ln_eps
        self.requires_grad_(True)  # the original may be frozen

    def forward(self, x_NLD: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x_NLD = _run_block(block, x_NLD, mask=mask)
        return x_NLD


def project_cls(visual: VisionTransformer, cls: Tensor) -> Tensor:
    """The tower's last LayerNorm and projection: ...D → ...E."""
    return visual.ln_post(cls) @ visual.proj


def embed_words(clip: open_clip.CLIP, tokens_TL: Tensor) -> Tensor:
    """Token plus position embeddings, TLD."""
    return clip.token_embedding(tokens_TL) + clip.positional_embedding[: tokens_TL.shape[1]]


def encode_text(clip: open_clip.CLIP, tokens_TL: Tensor) -> tuple[Tensor, Tensor]:
    """Sentence vectors TE (not normalised) and word features TLE. L may be shorter than the context.

    Equal to open_clip's `encode_text` on padded ids, because the attention is causal and reads out the end token.
    """
    length = tokens_TL.shape[1]
    x_TLD = clip.transformer(embed_words(clip, tokens_TL), attn_mask=clip.attn_mask[:length, :length])
    return read_out(clip, x_TLD, lengths(tokens_TL) - 1)


def read_out(clip: open_clip.CLIP, x_TLD: Tensor, slots_T: Tensor) -> tuple[Tensor, Tensor]:
    """The text tower's last LayerNorm and projection: that of one slot of each sentence TE, and all TLE."""
    words_TLE = clip.ln_final(x_TLD) @ clip.text_projection
    return words_TLE[torch.arange(len(x_TLD), device=x_TLD.device), slots_T], words_TLE


def vision_heads(visual: VisionTransformer) -> int:
    return int(visual.transformer.resblocks[0].attn.num_heads)


def text_heads(clip: open_clip.CLIP) -> int:
    return int(clip.transformer.resblocks[0].attn.num_heads)


def clip_from_config(config: dict[str, object]) -> nn.Module:
    """A CLIP from open_clip's own configuration keys (`embed_dim`, `vision_cfg`, `text_cfg`, `quick_gelu`)."""
    return open_clip.CLIP(**config)


def _register(backbone: str) -> str:
    """Make a model config file known to open_clip; returns the model's name."""
    path = Path(backbone) if backbone.endswith(".json") else BACKBONES / f"{backbone}.json"
    if path.is_file():
        open_clip.add_model_config(path)
        return path.stem
    if open_clip.get_model_config(backbone) is None:
        own = ", ".join(sorted(p.stem for p in BACKBONES.glob("*.json")))
        raise ConfigError(
            f"model.backbone={backbone} is unknown: give an open_clip name (ViT-B-32, ...), {own}, or a .json path"
        )
    return backbone


def _first_merges(folder: Path, vocabulary: int) -> str:
    """CLIP's byte-pair merges cut to the first ones: a tokenizer of `vocabulary` ids for small models.

    The ids are 512 bytes, the merges, start and end. Merges are ordered by frequency, so any prefix is a tokenizer.
    """
    with gzip.open(open_clip.tokenizer.default_bpe(), "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[: 1 + vocabulary - 512 - 2]
    path = folder / "merges.txt.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n".join(lines))
    return str(path)


def _without_code(path: Path, folder: Path) -> Path:
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
        return str(_without_code(path.absolute(), folder))
    tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)[:5]) or "none"
    raise ConfigError(f"model.pretrained={pretrained} is neither a file nor a tag of {name} (its tags: {tags})")
