"""The generic source: a JSONL or CSV file and a folder of videos.

One line per caption or per video: {"video": "a.mp4", "captions": ["...", "..."]} or {"video": "a.mp4", "caption":
"..."}, with optional `split`, `group` (the source_id: what must not be divided between splits), `start` and `end`
(seconds). Lines for the same clip merge. A CSV has the same names as columns.
"""

import csv
import hashlib
import io
import json
import logging
import posixpath
import re
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from common.errors import DataError
from datasets_prep.config import CustomConfig
from datasets_prep.plan import Clip
from datasets_prep.sources.annotations import clean, read_text
from datasets_prep.sources.files import VideoFiles

log = logging.getLogger(__name__)
COLUMNS = {"video", "caption", "captions", "split", "group", "start", "end"}
Key = tuple[str, float | None, float | None]  # video, start, end: what makes a clip


class Line(NamedTuple):
    """One checked line; `where` is what an error calls it."""

    where: str
    key: Key
    captions: list[str]
    split: str | None
    group: str | None


def read(config: CustomConfig) -> list[Clip]:
    """The clips of an annotation file.

    Raises:
        DataError: empty file, bad line (with its number), or lines that contradict each other.
        StorageError: the file or the folder can't be read.
    """
    merged: dict[Key, Line] = {}
    for line in _lines(config.annotations):
        merged[line.key] = _merge(merged[line.key], line) if line.key in merged else line
    if not merged:
        raise DataError(f"{config.annotations} holds no annotations: write one line per caption or per video")
    files = VideoFiles(config.videos)
    cuts = Counter(line.key[0] for line in merged.values())
    # Exactly as named: these are your own names, and two folders may well hold different files of one name.
    clips = [_clip(line, config, files.exact(line.key[0]), cuts[line.key[0]]) for line in merged.values()]
    empty = {"train", "val", "test"} - {c.split for c in clips}
    if empty:
        log.warning("%s: no video is in %s: training must be told", config.annotations, ", ".join(sorted(empty)))
    return clips


def deal(group: str, val_fraction: float, test_fraction: float) -> str:
    """The split of a group: by its hash alone, so that videos added later move no others."""
    draw = int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") / 2**64
    if draw < test_fraction:
        return "test"
    return "val" if draw < test_fraction + val_fraction else "train"


def span_id(video: str, start: float | None, end: float | None) -> str:
    """The id of a span of a video, "VIDEO:START-END"; of the whole one, just VIDEO."""
    if start is None and end is None:
        return video
    return f"{video}:{_seconds(start or 0.0)}-{'' if end is None else _seconds(end)}"


def _clip(line: Line, config: CustomConfig, file: tuple[str, int] | None, cuts: int) -> Clip:
    video, start, end = line.key
    group = line.group or video
    split = line.split or deal(group, config.val_fraction, config.test_fraction)
    share = None if file is None else file[1] // cuts
    captions = tuple(line.captions)
    return Clip(sys.intern(split), span_id(video, start, end), group, captions, video, start, end, share)


def _merge(first: Line, second: Line) -> Line:
    for name in ("split", "group"):
        values = {v for v in (getattr(first, name), getattr(second, name)) if v is not None}
        if len(values) > 1:
            raise DataError(f"{second.where}: {name} {getattr(second, name)!r} contradicts {first.where}")
    captions = first.captions + [c for c in second.captions if c not in first.captions]
    return Line(first.where, first.key, captions, first.split or second.split, first.group or second.group)


def _lines(annotations: str) -> Iterator[Line]:
    text = read_text(annotations)
    rows = _csv_rows(annotations, text) if annotations.endswith(".csv") else _jsonl_rows(annotations, text)
    ignored: set[str] = set()
    for where, row in rows:
        ignored.update(row.keys() - COLUMNS)
        yield _check(where, row)
    if ignored:
        log.warning(
            "%s: %s not used; known are %s", annotations, ", ".join(sorted(ignored)), ", ".join(sorted(COLUMNS))
        )


def _jsonl_rows(annotations: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(io.StringIO(text), 1):
        if not line.strip():
            continue
        where = f"{annotations}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise DataError(f'{where}: expected an object like {{"video": "a.mp4", "captions": ["..."]}}')
        yield where, row


def _csv_rows(annotations: str, text: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        missing = {"video", "caption"} - set(reader.fieldnames or ())
        if missing and text.strip():
            raise DataError(f"{annotations}, line 1: no column {', '.join(sorted(missing))}; it needs video,caption")
        for row in reader:
            where = f"{annotations}, line {reader.line_num}"
            if None in row:
                raise DataError(f"{where}: more values than columns; put a caption with commas in double quotes")
            yield where, {k: v for k, v in row.items() if v not in ("", None)}
    except csv.Error as error:
        raise DataError(f"{annotations}, line {reader.line_num}: not valid CSV ({error})") from None


def _check(where: str, row: dict[str, Any]) -> Line:
    video = row.get("video")
    if not isinstance(video, str) or not video:
        raise DataError(f"{where}: no 'video', the name of a file below source.videos")
    captions = row.get("captions", [])
    if not isinstance(captions, list):
        raise DataError(f"{where}: 'captions' is {captions!r}, not a list; one sentence goes in 'caption'")
    captions = [*captions, *([row["caption"]] if "caption" in row else [])]
    if not captions or not all(isinstance(c, str) and c.strip() for c in captions):
        raise DataError(f"{where}: no 'caption' or 'captions' with text in it")
    split = _text(where, row, "split")
    if split is not None and not re.fullmatch(r"[\w\-]+", split):
        raise DataError(f"{where}: split {split!r} names a folder: use letters, digits, - and _")
    start, end = _time(where, row, "start"), _time(where, row, "end")
    if end is not None and end <= (start or 0.0):
        raise DataError(f"{where}: end {end:g} is not after start {start or 0.0:g}")
    key = (posixpath.normpath(video), start, end)
    return Line(where, key, list(dict.fromkeys(map(clean, captions))), split, _text(where, row, "group"))


def _text(where: str, row: dict[str, Any], name: str) -> str | None:
    value = row.get(name)
    if value is None or (isinstance(value, str) and value):
        return value
    raise DataError(f"{where}: {name!r} is {value!r}, not a text")


def _time(where: str, row: dict[str, Any], name: str) -> float | None:
    value = row.get(name)
    try:
        seconds = None if value is None else float(value)
    except (TypeError, ValueError):
        seconds = -1.0
    if seconds is not None and not 0 <= seconds < float("inf"):
        raise DataError(f"{where}: {name!r} is {value!r}, not a number of seconds")
    return seconds


def _seconds(value: float) -> str:
    return f"{value:.3f}".rstrip("0").rstrip(".")
