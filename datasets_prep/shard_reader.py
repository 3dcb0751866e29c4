"""One tar of someone else → its marker. The tar is read and never written; any number of attempts give the same bytes.

The layouts of video2dataset (mp4, txt, json) and open_clip (mp4, txt), and of our own tars; names by webdataset's rule.
"""

import json
import os
import re
import tarfile
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from common import shards, storage
from common.config import validate
from common.errors import DataError, StorageError
from common.shards import VIDEO_SUFFIXES, Caption, Histograms, Rejected, SampleIndex, SampleInfo, ShardEntry, ShardIndex
from datasets_prep import histograms
from datasets_prep.check import check_apart
from datasets_prep.config import IndexConfig, VideoConfig
from datasets_prep.shard_writer import members_of, outcome

Members = dict[str, tuple[int, int]]


class Summary(NamedTuple):
    """What the driver keeps of a marker: it holds the captions of no tar."""

    entry: ShardEntry
    video_ids: list[str]
    reasons: Counter[str]
    histograms: Histograms


def index_tar(folder: str, name: str, plan_hash: str, settings: dict[str, Any]) -> Summary:
    """Read the tar `name` below `folder` once and publish its marker beside it.

    Args:
        settings: an IndexConfig as plain data.

    Raises:
        DataError: it is no whole tar. What is wrong with one sample is in the marker.
        StorageError: it can't be reached.
    """
    config = validate(IndexConfig, settings)
    url = storage.join(folder, name)
    with tempfile.TemporaryDirectory(prefix="index-") as temporary:
        if storage.is_s3(url):
            tar = Path(temporary) / "tar"
            sha256 = storage.download(url, tar)
        else:
            tar = Path(url)
            if not tar.is_file():
                raise StorageError(f"{url} is not seen by node {os.uname().nodename}: put folder on shared storage")
            sha256 = shards.sha256_of(tar)
        try:
            members = members_of(tar)
        except (DataError, tarfile.TarError, EOFError) as error:
            raise DataError(f"{url} is no whole tar ({error}): move it away and run again to go on") from None
        samples: list[SampleIndex] = []
        rejected: list[Rejected] = []
        with open(tar, "rb") as file:
            for key, of_key in members.items():
                try:
                    samples.append(_sample(file, name, key, of_key, config, Path(temporary) / "video"))
                except DataError as error:
                    rejected.append(Rejected(video_id=key, reason=str(error)))
        size = tar.stat().st_size
    marker = ShardIndex(
        plan_hash=plan_hash,
        sha256=sha256,
        bytes=size,
        samples=samples,
        rejected=rejected,
        histograms=histograms.of(s.info for s in samples if s.info),
    )
    content = marker.model_dump_json(exclude_none=True).encode()
    storage.publish_bytes(content, storage.join(folder, shards.marker_name(name)))
    return summarise(name, marker)


def summarise(name: str, marker: ShardIndex) -> Summary:
    entry, reasons, counts = outcome(name, marker)
    return Summary(entry, [s.video_id for s in marker.samples], reasons, counts)


def _sample(file: BinaryIO, name: str, key: str, members: Members, config: IndexConfig, temporary: Path) -> SampleIndex:
    """Raises DataError with a reason that fits many samples."""

    def read(suffix: str) -> bytes:
        offset, size = members[suffix]
        file.seek(offset)
        return file.read(size)

    suffix = next((s for s in VIDEO_SUFFIXES if s in members), None)
    if suffix is None:
        raise DataError(f"no video ({', '.join(VIDEO_SUFFIXES)})")
    notes = _notes(read("json")) if "json" in members else {}
    captions = _captions(notes, read("txt") if "txt" in members else b"", config.caption)
    video_id, source_id = _names(name, key, notes, config.video_ids)
    # As a file: decord would print the bytes of a broken video into the log.
    temporary.write_bytes(read(suffix))
    if not temporary.stat().st_size:
        raise DataError("the video is empty")
    found = check_apart(temporary, every_frame=False, config=VideoConfig())
    info = SampleInfo(
        video_id=video_id,
        source_id=source_id,
        captions=[Caption(id=f"{video_id}#{i}", text=text) for i, text in enumerate(captions)],
        duration_s=found.duration_s,
        fps=found.fps,
        num_frames=found.num_frames,
        width=found.width,
        height=found.height,
    )
    return SampleIndex(
        key=key, video_id=video_id, source_id=source_id, num_captions=len(captions), members=members, info=info
    )


def _notes(data: bytes) -> dict[str, Any]:
    try:
        notes = json.loads(data)
    except ValueError:
        raise DataError("its json is not valid JSON") from None
    if not isinstance(notes, dict):
        raise DataError("its json is no object")
    return notes


def _captions(notes: Mapping[str, Any], txt: bytes, key: str | None) -> list[str]:
    """A key that was asked for stands; else the .txt, which open_clip reads too, goes before the json."""
    if key is None:
        try:
            found = _texts(txt.decode())
        except UnicodeDecodeError:
            raise DataError("its txt is not UTF-8") from None
        found = found or _texts(notes.get("caption")) or _texts(notes.get("captions"))
    else:
        found = _texts(notes.get(key))
    if not found:
        raise DataError("no caption" + (f": its json has no text at {key!r}" if key else ""))
    return found


def _texts(value: Any) -> list[str]:
    """The texts in a string, in a list of strings, or in our own list of {id, text}."""
    values = value if isinstance(value, list) else [value]
    texts = [v.get("text") if isinstance(v, dict) else v for v in values]
    return [text.strip() for text in texts if isinstance(text, str) and text.strip()]


def _names(name: str, key: str, notes: Mapping[str, Any], video_ids: str) -> tuple[str, str]:
    """The video_id and source_id of a sample.

    video2dataset's `videoid` is the video that its clips were cut from; its `key` ends in _00000 for the first clip.
    """
    from_tar = f"{name.removesuffix('.tar')}/" if video_ids == "tar" else ""
    own = _first(notes, "video_id", "key", "videoid") if not from_tar else None
    video_id = own or from_tar + key.removeprefix("./")
    clip = re.fullmatch(r"(.+)_\d+", video_id) if notes.get("clips") else None
    return video_id, _first(notes, "source_id", "videoid") or (clip[1] if clip else video_id)


def _first(notes: Mapping[str, Any], *keys: str) -> str | None:
    """The first of these that is there: a name, or a number that is one."""
    values = (notes.get(key) for key in keys)
    return next((str(v) for v in values if isinstance(v, str | int) and not isinstance(v, bool) and str(v)), None)
