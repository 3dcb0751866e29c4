"""Tables of any length in CSV or parquet: WebVid, Panda-70M, and whatever has an id, a caption and perhaps times.

Read twice in a stream: first to look up files, count the clips of each and find repeated ids, at 16 bytes a clip
or less, then to give the clips out.
"""

import ast
import contextlib
import hashlib
import json
import logging
import sys
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from common.errors import DataError
from datasets_prep.benchmarks import TableColumns, TableConfig
from datasets_prep.plan import Clip
from datasets_prep.sources.annotations import clean
from datasets_prep.sources.custom import span_id
from datasets_prep.sources.files import VideoFiles
from datasets_prep.sources.locate import carve
from datasets_prep.sources.rows import read_rows

log = logging.getLogger(__name__)
NO_FILE = -1
RENAME = "give source.columns.* their names, and null to one that is not there"


class Part(NamedTuple):
    """A clip's id and what it shows: `captions` are cleaned."""

    video_id: str
    captions: tuple[str, ...]
    start: float | None
    end: float | None


class Row(NamedTuple):
    """One checked row: a video or a part of it, or a long video with many parts."""

    split: str
    source_id: str
    names: list[str]  # of the file, first choice first
    url: str | None
    parts: list[Part]


class Survey(NamedTuple):
    """What the first reading found. `files` has a number for each row, or NO_FILE."""

    files: "array[int]"
    clips_of_file: "np.ndarray[Any, np.dtype[np.uint32]]"
    repeated: frozenset[int]  # hashes of ids that occur more than once


def read(config: TableConfig) -> Iterator[Clip]:
    """The clips of the tables, one by one.

    A repeated id is taken once: from test before val before train, so what is tested on is not trained on.

    Raises:
        DataError: a column is missing, a value is of another form (with its line), or no row has a caption.
        StorageError: a table or the folder can't be read.
    """
    files = VideoFiles(config.videos)
    survey = _survey(config, files)
    seen: set[str] = set()
    skipped = 0
    for row, number in zip(_rows(config), survey.files, strict=True):
        path, size = files[number] if number != NO_FILE else (row.names[0] if row.url is None else row.url, None)
        for part in row.parts:
            if _hash(part.video_id) in survey.repeated:
                if part.video_id in seen:
                    skipped += 1
                    continue
                seen.add(part.video_id)
            share = None if size is None else size // int(survey.clips_of_file[number])
            yield Clip(row.split, part.video_id, row.source_id, part.captions, path, part.start, part.end, share)
    if skipped:
        log.warning("%d clips repeat the id of another: left out", skipped)


def _survey(config: TableConfig, files: VideoFiles) -> Survey:
    numbers, ids = array("q"), array("Q")
    counts = np.zeros(len(files), np.uint32)
    has_captions = False
    for row in _rows(config):
        has_captions = has_captions or any(part.captions for part in row.parts)
        number = next((n for n in map(files.index, row.names) if n is not None), NO_FILE)
        numbers.append(number)
        ids.extend(_hash(part.video_id) for part in row.parts)
        if number != NO_FILE:
            counts[number] += len(row.parts)
    if not has_captions:
        raise DataError(f"{config.train} holds no row with a caption: nothing to build")
    values, occurrences = np.unique(np.frombuffer(ids, np.uint64), return_counts=True)
    return Survey(numbers, counts, frozenset(values[occurrences > 1].tolist()))


def _rows(config: TableConfig) -> Iterator[Row]:
    """Rows of all tables, test first."""
    wanted = [name for name in config.columns.model_dump().values() if name is not None]
    for split, url in (("test", config.test), ("val", config.val), ("train", config.train)):
        for where, values in read_rows(url, wanted, RENAME) if url else ():
            row = _row(where, values, split, config.columns)
            if config.val is None:
                row = row._replace(split=sys.intern(carve(split, row.source_id, config.carve_val)))
            yield row


def _row(where: str, values: dict[str, Any], split: str, columns: TableColumns) -> Row:
    video_id = _text(values[columns.id])
    if not video_id:
        raise DataError(f"{where}: no id in column {columns.id!r}: correct it")
    path = _text(values[columns.path]) if columns.path else ""
    url = _text(values[columns.url]) if columns.url else ""
    caption = values[columns.caption]
    if columns.spans:
        spans = [_span(where, span) for span in _list(where, columns.spans, values[columns.spans])]
        captions = [[c] for c in _list(where, columns.caption, caption)]
        if len(spans) != len(captions):
            raise DataError(f"{where}: {len(captions)} captions for {len(spans)} spans: correct it")
    else:
        times = [_seconds(where, values[c]) if c else None for c in (columns.start, columns.end)]
        spans, captions = [_checked(where, *times)], [caption if isinstance(caption, list) else [caption]]
    parts = []
    for (start, end), of_part in zip(spans, captions, strict=True):
        cleaned = tuple(c for c in (clean(_text(text)) for text in of_part) if c)
        parts.append(Part(span_id(video_id, start, end), cleaned, start, end))
    # With a path, rows of other ids may be parts of the same file.
    return Row(split, path or video_id, [path, video_id] if path else [video_id], url or None, parts)


def _text(value: Any) -> str:
    return "" if value is None else str(value).strip()


def _list(where: str, column: str, value: Any) -> list[Any]:
    """A list, as parquet holds it, or written out as JSON or as Python prints it."""
    if isinstance(value, str):
        for parse in (json.loads, ast.literal_eval):
            with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
                value = parse(value)
                break
    if not isinstance(value, list):
        raise DataError(f"{where}: column {column!r} holds {str(value)[:40]!r}, not a list: correct it")
    return value


def _span(where: str, value: Any) -> tuple[float | None, float | None]:
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise DataError(f"{where}: {str(value)[:40]!r} is not a pair [start, end]: correct it")
    return _checked(where, _seconds(where, value[0]), _seconds(where, value[1]))


def _checked(where: str, start: float | None, end: float | None) -> tuple[float | None, float | None]:
    if end is not None and end <= (start or 0.0):
        raise DataError(f"{where}: end {end:g} is not after start {start or 0.0:g}: correct it")
    return start, end


def _seconds(where: str, value: Any) -> float | None:
    """Of 12.5, "12.5" or "0:00:12.500"; None of nothing."""
    text = _text(value)
    if not text:
        return None
    try:
        seconds = 0.0
        for part in text.split(":"):
            seconds = 60 * seconds + float(part)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise DataError(f"{where}: {text!r} is no time in seconds or as H:MM:SS.mmm: correct it")
    return seconds


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
