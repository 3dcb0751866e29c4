"""LSMDC: files separated by tabs, without a header: clip id, four times, sentence."""

import logging
import re
from collections.abc import Iterator

from common.errors import DataError
from datasets_prep.benchmarks import LsmdcConfig
from datasets_prep.plan import Clip
from datasets_prep.sources.annotations import read_text
from datasets_prep.sources.locate import Annotated, Span, carve, locate

log = logging.getLogger(__name__)
COLUMNS = 6
# The field's code skips this clip by name: its file is broken.
SKIPPED = "1012_Unbreakable_00.05.16.065-00.05.21.941"


def read(config: LsmdcConfig) -> list[Clip]:
    """The clips of LSMDC; a clip's source is its movie.

    Raises:
        DataError: a line has not six values, or a clip is in two splits.
        StorageError: a file or the folder can't be read.
    """
    annotated = list(_split("train", config.train))
    if config.val is None:
        annotated = [v._replace(split=carve("train", v.source_id, config.carve_val)) for v in annotated]
    else:
        annotated += _split("val", config.val)
    return locate([*annotated, *_split("test", config.test)], config.videos)


def _split(split: str, url: str) -> Iterator[Annotated]:
    sentences: dict[str, list[str]] = {}
    # Not by the csv module: a quotation mark in a sentence is a quotation mark. Not by splitlines() either, which
    # also ends a line at characters that a sentence may hold.
    for number, line in enumerate(read_text(url).split("\n"), 1):
        if not line.strip():
            continue
        values = line.rstrip("\r").split("\t")
        if len(values) != COLUMNS:
            raise DataError(
                f"{url}, line {number}: {len(values)} values separated by tabs, not the {COLUMNS} of LSMDC (clip id, "
                "four times, sentence): give the annotations with sentences, as they were published"
            )
        sentences.setdefault(values[0].strip(' "'), []).append(values[-1])
    if not sentences:
        raise DataError(f"{url} holds no clip: give LSMDC's annotation file")
    if sentences.pop(SKIPPED, None):
        log.warning("%s: %s is left out, as everywhere: its file is broken", url, SKIPPED)
    repeated = sum(len(of_clip) > 1 for of_clip in sentences.values())
    if repeated:
        log.warning("%s: %d clip ids occur more than once: their sentences are captions of one clip", url, repeated)
    for clip_id, of_clip in sentences.items():
        yield Annotated(split, clip_id, _movie(clip_id), of_clip, (Span(clip_id),))


def _movie(clip_id: str) -> str:
    """ "1012_Unbreakable" of "1012_Unbreakable_00.05.16.065-00.05.21.941"."""
    return re.sub(r"_\d\d\.\d\d\.\d\d\.\d{3}-\d\d\.\d\d\.\d\d\.\d{3}$", "", clip_id)
