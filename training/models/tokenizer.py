"""Sentences → ids, by the tokenizer that a backbone was trained with."""

import functools
import gzip
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from common.errors import ConfigError
from training.models.clip import lengths
from training.models.clip_weights import register
from training.models.open_clip_lib import open_clip

FULL_VOCABULARY = 49408


@functools.lru_cache(maxsize=8)
def tokenizer(backbone: str, max_tokens: int) -> Callable[[list[str]], Tensor]:
    """A function from sentences to int64 ids TL.

    A longer sentence is cut to `max_tokens`, its end token kept. Ids are padded to the longest of them, or to the
    backbone's context if its text tower reads the padding.

    Raises:
        ConfigError: the tokenizer's files are not to be had.
    """
    found = register(backbone)
    name = Path(backbone).stem if backbone.endswith(".json") else backbone
    context, size = min(max_tokens, found.context), found.text.get("vocab_size", FULL_VOCABULARY)
    is_clips = "CLIP's tokenizer" in found.traits
    try:
        with tempfile.TemporaryDirectory() as folder:
            is_small = is_clips and size < FULL_VOCABULARY
            smaller = {"bpe_path": _first_merges(Path(folder), size)} if is_small else {}
            encode = open_clip.get_tokenizer(name, context_length=context, **smaller)
    except (ImportError, OSError, ValueError) as error:  # what transformers and its hub client raise
        if is_clips:
            raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"model.backbone={backbone} needs the tokenizer {found.text['hf_tokenizer_name']!r}, which cannot be loaded "
            f"({reason}): run where the hub can be reached or has been before, or save its files in a folder, and name "
            "that as text_cfg.hf_tokenizer_name in a .json of your own"
        ) from None

    def tokenize(texts: list[str]) -> Tensor:
        tokens_TL = encode(texts)
        is_cut = is_clips and not found.reads_padding
        return tokens_TL[:, : int(lengths(tokens_TL).max())] if is_cut else tokens_TL

    return tokenize


def frequent_ids(backbone: str, words: Sequence[str]) -> list[int]:
    """Ids of the words that are one token, and of CLIP's start and end tokens."""
    tokens_TL = tokenizer(backbone, 8)(list(words))
    single = tokens_TL[lengths(tokens_TL) == 3]
    return sorted(set(single[:, :3].flatten().tolist()))


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
