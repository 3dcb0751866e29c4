"""Put the vectors that retrieval.embed wrote into a FAISS index of inner products (exact, no training).

Writes index.faiss, ids.parquet (row i describes vector i) and, last, index.json below `output`.
Next: python -m retrieval.search "a sentence" index=OUTPUT.

Shapes: V videos, T texts, D joint width, K results.
"""

import logging
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from common import logs, shards, storage
from common.config import from_command_line, refuse_relative_in_job
from common.errors import DataError, NoBucketError, NotFoundError, exit_with
from retrieval.config import PRESETS, IndexConfig
from retrieval.embeddings import Embeddings, Record, Source, parse, read_embeddings, read_part

log = logging.getLogger(__name__)
VECTORS, IDS, INFO = "index.faiss", "ids.parquet", "index.json"


class IndexInfo(Record):
    """`index.json`. The hashes tie the two files to it, so a half-replaced index is noticed."""

    embeddings: str
    source: Source
    videos: int
    dimension: int
    vectors_sha256: str
    ids_sha256: str


class Index(NamedTuple):
    """An open index. `ids` has one row per vector: video_id, caption_ids, captions, shard, key, offset, size."""

    info: IndexInfo
    vectors: Any
    ids: pa.Table

    def nearest(self, queries_TD: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and rows TK of the best videos, best first; K is k, or all videos if they are fewer."""
        scores_TK, rows_TK = self.vectors.search(np.ascontiguousarray(queries_TD), min(k, self.vectors.ntotal))
        return scores_TK, rows_TK


def build(config: IndexConfig) -> IndexInfo:
    """Write the index of an embeddings folder. Raises DataError, StorageError."""
    import faiss

    refuse_relative_in_job(config, "embeddings", "output")
    url, output = storage.absolute(config.embeddings), storage.absolute(config.output)
    embeddings = read_embeddings(url)
    if embeddings.source.kind == "features":
        raise DataError(
            f"{url} holds features of run {embeddings.source.run}, whose scorer reads a video only together with a "
            f"query: there is no vector to index. Give retrieval.search rerank={url} beside the index of another run"
        )
    index = faiss.IndexFlatIP(*embeddings.source.shape)
    tables = []
    with logs.progress(embeddings.parts, "parts", len(embeddings.parts)) as parts:
        for part in parts:
            vectors_VD, table = read_part(url, part, embeddings.source)
            index.add(vectors_VD)
            tables.append(table)
    if not index.ntotal:
        raise DataError(f"{url} holds no videos: its split {embeddings.source.split} is empty")
    ids = pa.concat_tables(tables)
    _check_unique(ids, url)
    info = _publish(index, ids, url, output, embeddings)
    log.info("%d vectors of width %d at %s", info.videos, info.dimension, output)
    return info


def _publish(index: Any, ids: pa.Table, url: str, output: str, embeddings: Embeddings) -> IndexInfo:
    import faiss

    with tempfile.TemporaryDirectory() as folder:
        vectors_path, ids_path = Path(folder) / VECTORS, Path(folder) / IDS
        faiss.write_index(index, str(vectors_path))
        pq.write_table(ids, ids_path)
        info = IndexInfo(
            embeddings=url,
            source=embeddings.source,
            videos=index.ntotal,
            dimension=index.d,
            vectors_sha256=shards.sha256_of(vectors_path),
            ids_sha256=shards.sha256_of(ids_path),
        )
        storage.publish(vectors_path, storage.join(output, VECTORS))
        storage.publish(ids_path, storage.join(output, IDS))
    storage.publish_bytes(info.model_dump_json(indent=2).encode(), storage.join(output, INFO))
    return info


def _check_unique(ids: pa.Table, url: str) -> None:
    counts = ids["video_id"].value_counts()
    repeated = [row["values"].as_py() for row in counts if row["counts"].as_py() > 1]
    if repeated:
        raise DataError(f"{url} holds video {repeated[0]} more than once: a video_id must be unique in its split")


def open_index(url: str) -> Index:
    """An index on storage, loaded. Raises DataError if it is unfinished or damaged."""
    import faiss

    place = storage.join(url, INFO)
    try:
        info = parse(IndexInfo, storage.read(place), place)
    except NoBucketError:
        raise
    except NotFoundError:
        raise DataError(
            f"{url} holds no index.json: no index, or retrieval.index has not finished (run it again)"
        ) from None
    with tempfile.TemporaryDirectory() as folder:
        paths = {VECTORS: Path(folder) / VECTORS, IDS: Path(folder) / IDS}
        for name, expected in ((VECTORS, info.vectors_sha256), (IDS, info.ids_sha256)):
            if storage.download(storage.join(url, name), paths[name]) != expected:
                raise DataError(
                    f"{storage.join(url, name)} is not the file that index.json names: run retrieval.index again"
                )
        return Index(info, faiss.read_index(str(paths[VECTORS])), pq.read_table(paths[IDS]))


def main() -> None:
    logs.setup()
    build(from_command_line(IndexConfig, PRESETS / "index", "retrieval.index"))


if __name__ == "__main__":
    exit_with(main)
