"""A node-local disk cache of shards: one GET each, checksum verified, shared by all processes of a node, bounded."""

import contextlib
import fcntl
import functools
import io
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from common import counts, retry, shards, storage
from common.errors import DataError, NoSpaceError, StorageError
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
                source = storage.join(self.url, shards.marker_name(entry.name))
                self._with_room(entry.bytes, lambda: storage.download(source, marker))
            if not tar.exists():
                if entry.bytes > self.limit_bytes:
                    raise StorageError(
                        f"data.cache_bytes={self.limit_bytes} is less than one shard of {entry.bytes} bytes: raise it"
                    )
                self._evict(self.limit_bytes - entry.bytes)
                self._with_room(entry.bytes, lambda: self._download(entry, tar))
                counts.so_far["shards_cached"] += 1
            os.utime(tar)
        return tar

    def _download(self, entry: ShardEntry, tar: Path) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return shards.fetch_shard(self.url, entry, tar)
            except DataError as error:  # perhaps on the way only
                if attempt == ATTEMPTS:
                    raise
                log.warning("%s (attempt %d of %d)", error, attempt, ATTEMPTS)

    def _with_room(self, needed: int, act: Callable[[], object]) -> None:
        """`act()`, patient with the storage; on a full disk after removing what was used longest ago."""
        try:
            retry.again(act)
        except NoSpaceError:
            log.warning(
                "the disk of data.cache=%s is full below data.cache_bytes: removing %d bytes", self.root, needed
            )
            used = sum(size for _, size, _ in _tars(self.root))
            self._evict(used - needed)
            try:
                retry.again(act)
            except NoSpaceError:
                raise NoSpaceError(
                    f"data.cache={self.root} has no room for a shard of {needed} bytes: make room on that disk, or "
                    "give a folder on a larger one"
                ) from None

    def _evict(self, limit: int) -> None:
        """Remove tars, the least recently used first, until they take no more than `limit` bytes."""
        with _locked(self.root / "evict.lock"):
            tars = list(_tars(self.root))
            used = sum(size for _, size, _ in tars)
            for _, size, path in sorted(tars):
                if used <= limit:
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


class _Tar(io.FileIO):
    """Closed with its last reference: whoever holds it reads on after it has left the cache."""

    def __del__(self) -> None:
        self.close()


@functools.lru_cache(maxsize=256)
def _open(cache: ShardCache, name: str, entry: ShardEntry) -> tuple[BinaryIO, ShardIndex]:
    """One open file and parsed index per shard and process; a block of shards is in use at a time."""
    tar = cache._fetch(entry)
    index = shards.read_marker(str(cache.folder), name)
    if index.sha256 != entry.sha256:
        raise DataError(
            f"{cache.url}/{name}: its marker is not the one that dataset.json was made from; build it again"
        )
    return _Tar(tar), index


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock among the processes of this node; it goes with the process if that is killed."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
