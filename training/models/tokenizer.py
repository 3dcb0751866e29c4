"""Sentences → ids, by the tokenizer that a backbone was trained with, and back."""

import functools
import gzip
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from common.errors import ConfigError
from training.backbone import Backbone
from training.models.clip import lengths
from training.models.clip_weights import register
from training.models.open_clip_lib import open_clip

FULL_VOCABULARY = 49408


@functools.lru_cache(maxsize=8)
def tokenizer(backbone: str, max_tokens: int, is_padded: bool = False) -> Callable[[list[str]], Tensor]:
    """A function from sentences to int64 ids TL.

    A longer sentence is cut to `max_tokens`, its end token kept. Ids are padded to the longest of them; all the way if
    `is_padded`, or if the backbone's text tower reads the padding.

    Raises:
        ConfigError: the tokenizer's files are not to be had.
    """
    found = register(backbone)
    context, is_clips = min(max_tokens, found.context), "CLIP's tokenizer" in found.traits
    encode = _clips(found, context) if is_clips else _from_hub(backbone, found, context)

    def tokenize(texts: list[str]) -> Tensor:
        tokens_TL = encode(texts)
        is_cut = is_clips and not (found.reads_padding or is_padded)
        return tokens_TL[:, : int(lengths(tokens_TL).max())] if is_cut else tokens_TL

    return tokenize


def detokenizer(backbone: str) -> Callable[[list[int]], str]:
    """A function from ids of CLIP's vocabulary, without start and end, to the sentence, in its lower case."""
    found = register(backbone)
    assert "CLIP's tokenizer" in found.traits, "a caption head is refused on any other"
    decode = _clips(found, found.context).decode
    # What the tokenizer takes apart: "it 's", "1 0".
    return lambda ids: re.sub(r" (?=[.,:;!?'])|(?<=\d) (?=\d)", "", decode(ids)).strip()


def frequent_ids(backbone: str, words: Sequence[str]) -> list[int]:
    """Ids of the words that are one token, and of CLIP's start and end tokens."""
    tokens_TL = tokenizer(backbone, 8)(list(words))
    single = tokens_TL[lengths(tokens_TL) == 3]
    return sorted(set(single[:, :3].flatten().tolist()))


def _clips(found: Backbone, context: int) -> Any:
    size = found.text.get("vocab_size", FULL_VOCABULARY)
    with tempfile.TemporaryDirectory() as folder:
        smaller = {"bpe_path": _first_merges(Path(folder), size)} if size < FULL_VOCABULARY else {}
        return open_clip.SimpleTokenizer(context_length=context, **found.text.get("tokenizer_kwargs", {}), **smaller)


def _from_hub(backbone: str, found: Backbone, context: int) -> Callable[[list[str]], Tensor]:
    try:
        return open_clip.get_tokenizer(found.name, context_length=context)
    except (ImportError, OSError, ValueError) as error:  # what transformers and its hub client raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ConfigError(
            f"model.backbone={backbone} needs the tokenizer {found.text['hf_tokenizer_name']}, which cannot be loaded "
            f"({reason}): run where the hub can be reached or its cache is filled, or save the tokenizer in a folder "
            "and name that as text_cfg.hf_tokenizer_name in a .json of your own"
        ) from None


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
