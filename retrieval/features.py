"""What a scorer reads of each video, in a folder of embeddings of the kind "features".

OUTPUT/part-000000.bin         one per shard: V rows of `shape` numbers of `dtype`, one after the other, no header
OUTPUT/part-000000.parquet     the rows' video ids; published after its .bin
OUTPUT/source.json, embeddings.json as for vectors

A search needs those of a hundred videos among millions. The index knows a video's shard, a part's small table its row,
and the row's place follows from its size: two short reads a video, whatever the cache holds.

Shapes: V videos of a part, K videos that are read, ... the source's `shape`.
"""

import math
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from common import storage
from common.errors import DataError
from retrieval.embeddings import Embeddings, Kept, Part, Source, publish_table, read_table

READS = 16  # at once


def write_features(url: str, source: Source, features_V: Kept, video_ids: list[str]) -> None:
    """Publish the part of one shard at `url`, the name of its parquet file.

    Args:
        features_V: V...
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.bin"
        features_V.astype(source.dtype).tofile(path)
        storage.publish(path, _rows_url(url))
    publish_table(url, source, {"video_id": pa.array(video_ids, pa.string())})


def read_features(url: str, embeddings: Embeddings, videos: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
    """Features K... of videos given by shard and video id; nothing else is loaded.

    Raises:
        DataError: one of them is not there.
    """
    source, dtype = embeddings.source, np.dtype(embeddings.source.dtype)
    size = math.prod(source.shape) * dtype.itemsize
    by_shard = {part.shard: part for part in embeddings.parts}
    parts = [by_shard[shard] for shard in dict.fromkeys(shard for shard, _ in videos) if shard in by_shard]

    def rows(part: Part) -> dict[tuple[str, str], tuple[str, int]]:
        ids = read_table(url, part, source)["video_id"].to_pylist()
        return {
            (part.shard, video_id): (_rows_url(storage.join(url, part.name)), row) for row, video_id in enumerate(ids)
        }

    with ThreadPoolExecutor(READS) as pool:
        places = {video: place for found in pool.map(rows, parts) for video, place in found.items()}
        for video in videos:
            if video not in places:
                raise DataError(
                    f"{url} holds no features of video {video[1]}: it was made of the split {source.split}; embed the "
                    "split of the index with the re-ranking run"
                )
        data = list(pool.map(lambda video: storage.read_range(places[video][0], places[video][1] * size, size), videos))
    return np.frombuffer(b"".join(data), dtype).reshape(len(videos), *source.shape).astype(np.float32)


def _rows_url(url: str) -> str:
    return url.removesuffix(".parquet") + ".bin"
