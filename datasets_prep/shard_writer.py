"""One shard: clips → a local tar → publish → its marker. Any number of attempts give the same bytes."""

import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import webdataset

from common import shards, storage
from common.config import validate
from common.errors import DataError, NotFoundError, StorageError
from common.shards import Caption, Rejected, SampleIndex, SampleInfo, ShardIndex
from datasets_prep import video
from datasets_prep.config import VideoConfig
from datasets_prep.plan import Clip, Shard


def write_shard(shard: Shard, plan_hash: str, videos: str, output: str, settings: dict[str, Any]) -> ShardIndex:
    """Build a shard and publish it below `output`; the marker goes last, so half a shard is never read.

    Args:
        videos: folder or URL that the clips' files are relative to.
        settings: a VideoConfig as plain data.

    Raises:
        StorageError: a source file or the output can't be reached. What is wrong with one clip is in the marker.
    """
    config = validate(VideoConfig, settings)
    with tempfile.TemporaryDirectory(prefix="shard-") as folder:
        tar = Path(folder) / "shard.tar"
        infos: dict[str, SampleInfo] = {}
        rejected: list[Rejected] = []
        with webdataset.TarWriter(str(tar), encoder=False, mtime=0, user="", group="") as writer:
            for row, clip in enumerate(shard.clips):
                key = f"{shard.number:06d}-{row:06d}"
                target = Path(folder) / "clip.mp4"
                try:
                    infos[key] = _convert(clip, videos, target, config)
                except DataError as error:
                    rejected.append(Rejected(video_id=clip.video_id, reason=str(error)))
                    continue
                json = infos[key].model_dump_json().encode()
                writer.write({"__key__": key, "mp4": target.read_bytes(), "json": json})
        index = ShardIndex(
            plan_hash=plan_hash,
            sha256=shards.sha256_of(tar),
            bytes=tar.stat().st_size,
            samples=list(_samples(tar, infos)),
            rejected=rejected,
        )
        storage.publish(tar, storage.join(output, shard.name))
    storage.publish_bytes(index.model_dump_json().encode(), storage.join(output, shards.marker_name(shard.name)))
    return index


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


def _convert(clip: Clip, videos: str, target: Path, config: VideoConfig) -> SampleInfo:
    if clip.size is None:
        raise DataError("there is no such file in source.videos")
    source = _fetch(storage.join(videos, clip.video), target.with_name("source"))
    made = video.convert(source, target, config, clip.start, clip.end)
    return SampleInfo(
        video_id=clip.video_id,
        source_id=clip.source_id,
        captions=[Caption(id=f"{clip.video_id}#{i}", text=text) for i, text in enumerate(clip.captions)],
        duration_s=made.duration_s,
        fps=made.fps,
        num_frames=made.num_frames,
        width=made.width,
        height=made.height,
    )


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
