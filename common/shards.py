"""The shard contract: what a prepared dataset looks like on storage (see ARCHITECTURE.md).

A dataset is a folder or prefix with `plan.json`, `dataset.json` (published last) and, per split, numbered
tars, each beside a JSON marker that is published only after its tar. Readers go by markers: a tar without
one does not exist for them.
"""

import hashlib
import io
import tarfile
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from common import storage
from common.errors import DataError, NoBucketError, NotFoundError

FORMAT_VERSION = 1
Payload = Literal["video", "frames"]
VIDEO_SUFFIXES = ("mp4", "webm", "mkv", "mov", "avi")  # of a sample's video; ours are mp4


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Histograms = dict[str, dict[str, int]]  # quantity ("duration_s") → lower bound of a bin → samples or captions in it


class Caption(_Record):
    """One sentence about one video. `id` is unique in the dataset."""

    id: str
    text: str


class SampleInfo(_Record):
    """The content of a sample's `KEY.json`.

    `video_id` is the unit of retrieval and unique in its split; `source_id` names the long video it was cut from.
    """

    video_id: str
    source_id: str
    captions: list[Caption]
    duration_s: float
    fps: float
    num_frames: int
    width: int
    height: int


class SampleIndex(_Record):
    """Where a sample lies in its tar: `members` maps a suffix ("mp4", "json", "000.jpg") to (offset, size).

    `info` is set where the tar is someone else's and has no `KEY.json` of ours (see datasets_prep/index.py).
    """

    key: str
    video_id: str
    source_id: str
    num_captions: int
    members: dict[str, tuple[int, int]]
    info: SampleInfo | None = None

    @property
    def pictures(self) -> list[str]:
        """The suffixes of its video, or of its JPEGs in the order of time, to be looked up in `members`.

        A JPEG beside a video is the thumbnail that someone else put there.
        """
        videos = [suffix for suffix in VIDEO_SUFFIXES if suffix in self.members]
        return videos[:1] or sorted(suffix for suffix in self.members if suffix.endswith("jpg"))


class Rejected(_Record):
    """A clip that is not in the shard, and why."""

    video_id: str
    reason: str


class ShardIndex(_Record):
    """A shard's commit marker, `SPLIT/shard-000000.json`."""

    format: int = FORMAT_VERSION
    plan_hash: str
    sha256: str
    bytes: int
    samples: list[SampleIndex]
    rejected: list[Rejected] = []
    histograms: Histograms = {}


class ShardEntry(_Record):
    """A shard as `dataset.json` lists it; `name` is relative to the dataset, with its ending .tar."""

    name: str
    samples: int
    captions: int
    bytes: int
    sha256: str


class SplitIndex(_Record):
    shards: list[ShardEntry]

    @property
    def samples(self) -> int:
        return sum(s.samples for s in self.shards)

    @property
    def captions(self) -> int:
        return sum(s.captions for s in self.shards)


class DatasetIndex(_Record):
    """`dataset.json`. Its sha256 names the dataset in every run, checkpoint and index made from it."""

    format: int = FORMAT_VERSION
    payload: Payload
    plan_hash: str
    splits: dict[str, SplitIndex]
    rejected: int

    def split(self, name: str) -> SplitIndex:
        """Raises DataError naming the splits that exist."""
        if name not in self.splits:
            raise DataError(f"the dataset has no split {name!r}; it has {', '.join(sorted(self.splits)) or 'none'}")
        return self.splits[name]


def shard_name(split: str, number: int) -> str:
    return f"{split}/shard-{number:06d}.tar"


def marker_name(name: str) -> str:
    """`train/shard-000000.tar` → `train/shard-000000.json`."""
    return name.removesuffix(".tar") + ".json"


def sha256_of(path: Path) -> str:
    """Hex sha256 of a local file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


R = TypeVar("R", bound=_Record)


def read_dataset(url: str) -> tuple[DatasetIndex, str]:
    """`dataset.json` below `url` and its sha256. Raises DataError if the build has not finished or it is damaged."""
    try:
        data = storage.read(storage.join(url, "dataset.json"))
    except NoBucketError:
        raise
    except NotFoundError:
        raise DataError(
            f"{url} holds no dataset.json: no dataset, or its build has not finished (run it again to go on)"
        ) from None
    return _parse(DatasetIndex, data, storage.join(url, "dataset.json")), hashlib.sha256(data).hexdigest()


def read_marker(url: str, name: str) -> ShardIndex:
    """The marker of the shard `name` of the dataset at `url`. Raises NotFoundError, DataError."""
    marker = storage.join(url, marker_name(name))
    return _parse(ShardIndex, storage.read(marker), marker)


def fetch_shard(url: str, entry: ShardEntry, path: Path) -> None:
    """Download a shard's tar to `path`. Raises DataError if its bytes are not those that the index names."""
    source = storage.join(url, entry.name)
    found = storage.download(source, path)
    if found != entry.sha256:
        path.unlink()
        raise DataError(
            f"{source} is damaged: its sha256 is {found[:12]}…, the index says {entry.sha256[:12]}…; build it again"
        )


def read_member(tar: BinaryIO, sample: SampleIndex, suffix: str) -> bytes:
    """The bytes of one member of a sample, straight from its offset in the open tar."""
    offset, size = sample.members[suffix]
    tar.seek(offset)
    data = tar.read(size)
    assert len(data) == size, f"{sample.key}.{suffix}: {len(data)} of {size} bytes"
    return data


def read_pictures(tar: BinaryIO, sample: SampleIndex) -> list[bytes]:
    """Its video alone, or its JPEGs in the order of time."""
    return [read_member(tar, sample, suffix) for suffix in sample.pictures]


def span_of(sample: SampleIndex) -> tuple[int, int]:
    """(offset, size) of all its pictures in the tar, for `pictures_in`: one read, where there are many JPEGs."""
    first, last = sample.members[sample.pictures[0]], sample.members[sample.pictures[-1]]
    if first == last:
        return first
    start = first[0] - tarfile.BLOCKSIZE  # with the header of the first
    return start, last[0] + last[1] - start


def pictures_in(span: bytes) -> list[bytes]:
    """The pictures in the bytes of a sample's span, as `read_pictures` has them."""
    if span[257:262] != b"ustar":
        return [span]
    padded = span + bytes(-len(span) % tarfile.BLOCKSIZE)  # the last member's, which the span leaves out
    with tarfile.open(fileobj=io.BytesIO(padded), mode="r:") as tar:
        files = ((member.name, tar.extractfile(member)) for member in tar if member.name.endswith("jpg"))
        return [file.read() for _, file in files if file]


def read_info(tar: BinaryIO, sample: SampleIndex) -> SampleInfo:
    return sample.info or SampleInfo.model_validate_json(read_member(tar, sample, "json"))


def _parse(record: type[R], data: bytes, url: str) -> R:
    try:
        parsed = record.model_validate_json(data)
    except ValidationError as error:
        raise DataError(f"{url} is damaged: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}") from None
    version = getattr(parsed, "format", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise DataError(f"{url} has format {version}, this program reads {FORMAT_VERSION}; build it again")
    return parsed
