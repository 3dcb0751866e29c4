"""The contract between embed and index: what a folder of vectors looks like; retrieval/features.py has the other kind.

OUTPUT/source.json             what the vectors are made from; written first, once
OUTPUT/part-000000.parquet     one per shard, published whole; its metadata repeats the source
OUTPUT/embeddings.json         published last: the source and the parts

Shapes: V videos, D joint width.
"""

import tempfile
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from common import storage
from common.errors import AlreadyExistsError, DataError, NoBucketError, NotFoundError, RunError

Kept = NDArray[np.float16] | NDArray[np.float32]
Kind = Literal["vectors", "features"]  # a vector D of each video, or what a scorer reads of it (retrieval/features.py)


class Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(Record):
    """What vectors are made from. Two sources are the same if all but the URLs are: weights and data may move."""

    run: str
    dataset: str
    weights_sha256: str
    dataset_sha256: str
    split: str
    views: int
    kind: Kind
    shape: tuple[int, ...]  # of what is kept of a video
    dtype: Literal["float16", "float32"]

    def differing(self, other: "Source") -> list[str]:
        """Names of the keys in which two sources are not the same."""
        mine, theirs = self.model_dump(exclude={"run", "dataset"}), other.model_dump(exclude={"run", "dataset"})
        return [key for key, value in mine.items() if value != theirs[key]]


class Part(Record):
    name: str
    shard: str
    videos: int


class Embeddings(Record):
    """`embeddings.json`."""

    source: Source
    parts: list[Part]

    @property
    def videos(self) -> int:
        return sum(part.videos for part in self.parts)


class Videos(Record):
    """Columns of a part beside the vectors, V each. `offsets` and `sizes` place an mp4 in its tar, in bytes."""

    video_ids: list[str]
    caption_ids: list[list[str]]
    captions: list[list[str]]
    keys: list[str]
    offsets: list[int]
    sizes: list[int]


def part_name(number: int) -> str:
    return f"part-{number:06d}.parquet"


def claim(url: str, source: Source) -> None:
    """Make `url` the place of what is kept of `source`. Raises RunError if it is that of another source."""
    place = storage.join(url, "source.json")
    try:
        storage.publish_bytes(source.model_dump_json(indent=2).encode(), place, if_none_match=True)
    except AlreadyExistsError:
        found = parse(Source, storage.read(place), place)
        if differing := source.differing(found):
            raise RunError(
                f"output={url} holds {found.kind} of run {found.run} and dataset {found.dataset} "
                f"with another {', '.join(differing)}: choose another output, or delete that folder"
            ) from None


def write_part(url: str, source: Source, shard: str, vectors_VD: Kept, videos: Videos) -> None:
    """Publish the part of one shard at `url`, of vectors."""
    count, dimension = vectors_VD.shape
    flat = pa.array(vectors_VD.astype(source.dtype).ravel())
    columns = {
        "video_id": pa.array(videos.video_ids, pa.string()),
        "vector": pa.FixedSizeListArray.from_arrays(flat, dimension),
        "caption_ids": pa.array(videos.caption_ids, pa.list_(pa.string())),
        "captions": pa.array(videos.captions, pa.list_(pa.string())),
        "shard": pa.array([shard] * count, pa.string()),
        "key": pa.array(videos.keys, pa.string()),
        "offset": pa.array(videos.offsets, pa.int64()),
        "size": pa.array(videos.sizes, pa.int64()),
    }
    publish_table(url, source, columns)


def publish_table(url: str, source: Source, columns: dict[str, pa.Array]) -> None:
    """Put a part's parquet file at `url`, whole; its metadata repeats the source."""
    table = pa.table(columns).replace_schema_metadata({"source": source.model_dump_json()})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.parquet"
        pq.write_table(table, path)
        storage.publish(path, url)


def read_embeddings(url: str) -> Embeddings:
    """`embeddings.json` below `url`. Raises DataError if embed has not finished there."""
    place = storage.join(url, "embeddings.json")
    try:
        return parse(Embeddings, storage.read(place), place)
    except NoBucketError:
        raise
    except NotFoundError:
        raise DataError(
            f"{url} holds no embeddings.json: no embeddings, or retrieval.embed has not finished (run it again)"
        ) from None


def read_part(url: str, part: Part, source: Source) -> tuple[NDArray[np.float32], pa.Table]:
    """Vectors VD and the other columns of a part. Raises DataError if it is not what embeddings.json names."""
    table = read_table(url, part, source)
    column = table["vector"].combine_chunks()
    vectors_VD = column.flatten().to_numpy(zero_copy_only=False).reshape(len(table), column.type.list_size)
    return vectors_VD.astype(np.float32), table.drop_columns(["vector"])


def read_table(url: str, part: Part, source: Source) -> pa.Table:
    """A part's parquet file. Raises DataError if it is not what embeddings.json names."""
    place = storage.join(url, part.name)
    try:
        table = pq.read_table(pa.BufferReader(storage.read(place)))
    except pa.ArrowInvalid as error:
        raise DataError(f"{place} is damaged: {str(error).splitlines()[0]}; delete it and embed again") from None
    found = parse(Source, (table.schema.metadata or {}).get(b"source", b"{}"), place)
    if found.differing(source) or len(table) != part.videos:
        raise DataError(f"{place} is not the part that embeddings.json names: delete it and embed again")
    return table


R = TypeVar("R", bound=Record)


def parse(record: type[R], data: bytes, url: str) -> R:
    """Raises DataError naming the file."""
    try:
        return record.model_validate_json(data)
    except ValidationError as error:
        raise DataError(f"{url} is damaged: {error.errors()[0]['msg']} at {error.errors()[0]['loc']}") from None
