"""Annotation files as people have them: odd encodings, JSON and id lists. Tables: rows.py."""

import codecs
import csv
import io
import json
import logging
from collections.abc import Iterable
from typing import Any

from common import storage
from common.errors import DataError

log = logging.getLogger(__name__)


def clean(caption: str) -> str:
    """The only change that captions undergo: no white space at the ends, one blank for any inside."""
    return " ".join(caption.split())


def read_text(url: str) -> str:
    """A file's text: UTF-8, and bytes that are not, as cp1252, with a line in the log.

    Raises:
        DataError: it is no text in either.
        StorageError: it can't be read.
    """
    data = storage.read(url)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if b"\0" in data:
            raise DataError(f"{url} is not UTF-8 text: save it as UTF-8") from None
        log.warning("%s is not UTF-8 at byte %d: read such bytes as cp1252", url, error.start)
        return data.decode("utf-8-sig", errors=CP1252)


def read_json(url: str) -> Any:
    """Raises DataError if it is not JSON, StorageError if it can't be read."""
    try:
        return json.loads(read_text(url))
    except ValueError as error:
        raise DataError(f"{url} is not JSON ({error}): give the annotation file as it was published") from None


def read_ids(url: str) -> list[str]:
    """Video ids, each once: a JSON list, else one a line; of a table with header, the column video_id or the first.

    Raises:
        DataError: there is none, or the JSON is no list.
        StorageError: it can't be read.
    """
    if url.endswith(".json"):
        ids = read_json(url)
        if not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
            raise DataError(f'{url} is no list of video ids: expected ["...", "..."]')
    else:
        rows = [row for row in csv.reader(io.StringIO(read_text(url), newline="")) if row and row[0].strip()]
        has_header = bool(rows) and "video_id" in rows[0]
        column = rows.pop(0).index("video_id") if has_header else 0
        ids = [row[column].strip() for row in rows if len(row) > column]
    if not ids:
        raise DataError(f"{url} lists no video: expected one id a line")
    once = list(dict.fromkeys(ids))
    if len(once) < len(ids):
        log.warning("%s: %d ids are listed twice: taken once", url, len(ids) - len(once))
    return once


def some(names: Iterable[str]) -> str:
    """The first few names, for a sentence."""
    listed = list(names)
    return ", ".join(listed[:3]) + (", …" if len(listed) > 3 else "")


def _cp1252(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    # Five bytes mean nothing in cp1252 either.
    return error.object[error.start : error.end].decode("cp1252", errors="replace"), error.end


CP1252 = "datasets_prep.cp1252"  # what `errors=` of a decoder takes
codecs.register_error(CP1252, _cp1252)
