"""A node-local disk cache of shards: one GET each, checksum verified, shared by all processes of a node, bounded."""

import contextlib
import fcntl
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from common import shards, storage
from common.errors import DataError, StorageError
from common.shards import ShardEntry, ShardIndex

log = logging.getLogger(__name__)
ATTEMPTS = 3


class ShardCache:
    """Shards of the dataset at `url`, kept below `folder` under the dataset's own hash.

    Args:
        dataset_sha256: of dataset.json; another build of the same URL never meets stale files.
        limit_bytes: the least recently used tars go first when the folder would grow beyond it. A process that has a
            removed tar open reads on.
    """

    def __init__(self, url: str, dataset_sha256: str, folder: str, limit_bytes: int) -> None:
        self.url, self.limit_bytes = url, limit_bytes
        self.root = Path(folder).expanduser()
        self.folder = self.root / dataset_sha256[:16]

    def open(self, entry: ShardEntry) -> tuple[BinaryIO, ShardIndex]:
        """The shard's tar, open and kept open by this process, and its index.

        Raises:
            DataError: its checksum differs from the index after several downloads.
            StorageError: it can't be read.
        """
        return _open(self, entry.name, entry)

    def _fetch(self, entry: ShardEntry) -> Path:
        """The local tar with its marker beside it; downloads them if they are not there."""
        tar = self.folder / entry.name
        marker = self.folder / shards.marker_name(entry.name)
        tar.parent.mkdir(parents=True, exist_ok=True)
        with _locked(tar.with_suffix(".lock")):
            if not marker.exists():
                storage.download(storage.join(self.url, shards.marker_name(entry.name)), marker)
            if not tar.exists():
                self._make_room(entry.bytes)
                self._download(entry, tar)
            os.utime(tar)
        return tar

    def _download(self, entry: ShardEntry, tar: Path) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return shards.fetch_shard(self.url, entry, tar)
            except Exception as error:
                if attempt == ATTEMPTS:
                    raise
                log.warning("%s (attempt %d of %d)", error, attempt, ATTEMPTS)

    def _make_room(self, needed: int) -> None:
        if needed > self.limit_bytes:
            raise StorageError(
                f"data.cache_bytes={self.limit_bytes} is less than one shard of {needed} bytes: raise it"
            )
        with _locked(self.root / "evict.lock"):
            tars = list(_tars(self.root))
            used = sum(size for _, size, _ in tars)
            for _, size, path in sorted(tars):
                if used + needed <= self.limit_bytes:
                    break
                path.unlink(missing_ok=True)
                used -= size


def _tars(root: Path) -> Iterator[tuple[float, int, Path]]:
    """(last use, bytes, path) of every finished tar; others come and go meanwhile."""
    for path in root.rglob("*.tar"):
        if not path.name.startswith(".tmp-"):
            with contextlib.suppress(FileNotFoundError):
                stat = path.stat()
                yield stat.st_mtime, stat.st_size, path


@functools.lru_cache(maxsize=256)
def _open(cache: ShardCache, name: str, entry: ShardEntry) -> tuple[BinaryIO, ShardIndex]:
    """One open file and parsed index per shard and process; a block of shards is in use at a time."""
    tar = cache._fetch(entry)
    index = shards.read_marker(str(cache.folder), name)
    if index.sha256 != entry.sha256:
        raise DataError(
            f"{cache.url}/{name}: its marker is not the one that dataset.json was made from; build it again"
        )
    return open(tar, "rb"), index


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock among the processes of this node; it goes with the process if that is killed."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
