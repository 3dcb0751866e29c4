"""One shard: clips → a local tar → publish → its marker. Any number of attempts give the same bytes."""

import contextlib
import errno
import os
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import webdataset

from common import shards, storage
from common.errors import DataError, NoSpaceError, NotFoundError, RunError, StorageError
from common.shards import (
    Caption,
    Histograms,
    Payload,
    Rejected,
    SampleIndex,
    SampleInfo,
    ShardEntry,
    ShardIndex,
)
from datasets_prep import histograms, video
from datasets_prep.config import FramesConfig, VideoConfig
from datasets_prep.plan import Clip, Shard

MISSING, SILENT = "there is no such file in source.videos", "no caption"


class Outcome(NamedTuple):
    """What a build keeps of a finished shard: the samples themselves would not fit in the driver."""

    entry: ShardEntry
    reasons: Counter[str]
    histograms: Histograms


class Recipe(NamedTuple):
    """How a clip becomes a sample; `videos` is the folder or URL that clips' files are relative to."""

    videos: str
    payload: Payload
    video: VideoConfig
    frames: FramesConfig


def write_shard(shard: Shard, plan_hash: str, output: str, recipe: Recipe) -> Outcome:
    """Build a shard and publish it below `output`; the marker goes last, so half a shard is never read.

    Raises:
        StorageError: a source file or the output can't be reached. What is wrong with one clip is in the marker.
        RunError: the node is at fault.
    """
    with _with_room(), tempfile.TemporaryDirectory(prefix="shard-") as folder:
        tar = Path(folder) / "shard.tar"
        infos: dict[str, SampleInfo] = {}
        rejected: list[Rejected] = []
        with webdataset.TarWriter(str(tar), encoder=False, mtime=0, user="", group="") as writer:
            for row, (clip, source) in enumerate(_sources(shard.clips, recipe.videos, Path(folder))):
                key = f"{shard.number:06d}-{row:06d}"
                try:
                    infos[key], members = _sample(clip, source, Path(folder), recipe)
                except DataError as error:
                    rejected.append(Rejected(video_id=clip.video_id, reason=str(error)))
                    continue
                except RunError as error:
                    raise RunError(f"video {clip.video_id}: {error}") from None
                json = infos[key].model_dump_json().encode()
                writer.write({"__key__": key, **members, "json": json})
        index = ShardIndex(
            plan_hash=plan_hash,
            sha256=shards.sha256_of(tar),
            bytes=tar.stat().st_size,
            samples=list(_samples(tar, infos)),
            rejected=rejected,
            histograms=histograms.of(infos.values()),
        )
        storage.publish(tar, storage.join(output, shard.name))
    marker = index.model_dump_json(exclude_none=True).encode()
    storage.publish_bytes(marker, storage.join(output, shards.marker_name(shard.name)))
    return outcome(shard.name, index)


@contextlib.contextmanager
def _with_room() -> Iterator[None]:
    """A full disk is the node's fault: another may have room."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"{tempfile.gettempdir()} of node {os.uname().nodename}"
        raise NoSpaceError(f"no room for a shard in {where}: make room and run again to go on") from None


def outcome(name: str, index: ShardIndex) -> Outcome:
    """What a build keeps of the shard `name`."""
    entry = ShardEntry(
        name=name,
        samples=len(index.samples),
        captions=sum(s.num_captions for s in index.samples),
        bytes=index.bytes,
        sha256=index.sha256,
    )
    return Outcome(entry, Counter(r.reason for r in index.rejected), index.histograms)


def members_of(tar: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """Key → suffix → (offset, size) of what a tar holds, in its order; by webdataset's rule for names.

    Raises DataError if a name occurs twice, tarfile.TarError if it is no whole tar.
    """
    members: dict[str, dict[str, tuple[int, int]]] = {}
    with tarfile.open(tar, "r:") as archive:
        for member in archive:
            folder, slash, name = member.name.rpartition("/")
            key, _, suffix = name.partition(".")
            if not member.isfile() or not key or not suffix:  # a folder, a hidden file, a README
                continue
            of_key = members.setdefault(f"{folder}{slash}{key}", {})
            if suffix.lower() in of_key:
                raise DataError(f"it holds {member.name} twice")
            of_key[suffix.lower()] = (member.offset_data, member.size)
    return members


def _samples(tar: Path, infos: dict[str, SampleInfo]) -> Iterator[SampleIndex]:
    members = members_of(tar)
    for key, info in infos.items():
        yield SampleIndex(
            key=key,
            video_id=info.video_id,
            source_id=info.source_id,
            num_captions=len(info.captions),
            members=members[key],
        )


def _sample(clip: Clip, source: Path | None, folder: Path, recipe: Recipe) -> tuple[SampleInfo, dict[str, bytes]]:
    """A clip's info and its members by suffix. Raises DataError with the reason to reject it."""
    if source is None:
        raise DataError(MISSING)
    if not clip.captions:
        raise DataError(SILENT)
    if recipe.payload == "video":
        target = folder / "clip.mp4"
        made = video.convert(source, target, recipe.video, clip.start, clip.end)
        members = {"mp4": target.read_bytes()}
    else:
        made, jpegs = video.convert_to_frames(source, folder, recipe.video, recipe.frames, clip.start, clip.end)
        members = {f"{i:03d}.jpg": data for i, data in enumerate(jpegs)}
    info = SampleInfo(
        video_id=clip.video_id,
        source_id=clip.source_id,
        captions=[Caption(id=f"{clip.video_id}#{i}", text=text) for i, text in enumerate(clip.captions)],
        duration_s=made.duration_s,
        fps=made.fps,
        num_frames=made.num_frames,
        width=made.width,
        height=made.height,
    )
    return info, members


def _sources(clips: list[Clip], videos: str, folder: Path) -> Iterator[tuple[Clip, Path | None]]:
    """Each clip with a local path of its file, None if there is no such file.

    A file on S3 is downloaded once for all its clips, which follow each other, and while the one before is converted.
    """
    groups = [(name, list(group)) for name, group in groupby(clips, lambda c: c.video if c.size is not None else None)]
    paths = [folder / "source-0", folder / "source-1"]
    with ThreadPoolExecutor(1) as ahead:

        def fetch(i: int) -> Future[Path] | None:
            name = groups[i][0] if i < len(groups) else None
            return None if name is None else ahead.submit(_fetch, storage.join(videos, name), paths[i % 2])

        coming = fetch(0)
        for i, (_, group) in enumerate(groups):
            source = coming.result() if coming else None
            coming = fetch(i + 1)
            yield from ((clip, source) for clip in group)
            paths[i % 2].unlink(missing_ok=True)


def _fetch(url: str, path: Path) -> Path:
    """A local path of the source file. It was there when the plan was made, so its absence is no fault of the clip."""
    if not storage.is_s3(url):
        if not Path(url).is_file():
            raise StorageError(f"{url} is not seen by node {os.uname().nodename}: put source.videos on shared storage")
        return Path(url)
    try:
        storage.download(url, path)
    except NotFoundError:
        raise StorageError(f"{url} is gone since the build began: put it back, or choose a new output") from None
    return path
