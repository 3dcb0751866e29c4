"""The shard cache: one download for all processes, verified, bounded."""

import hashlib
import threading
import time
from pathlib import Path

import pytest

from common import storage
from common.errors import DataError, StorageError
from common.shards import SampleIndex, ShardEntry, ShardIndex
from training.data import cache as caches
from training.data.cache import ShardCache


def make_shard(root: Path, number: int, content: bytes) -> ShardEntry:
    name = f"train/shard-{number:06d}.tar"
    sha256 = hashlib.sha256(content).hexdigest()
    sample = SampleIndex(key="0", video_id="a", source_id="a", num_captions=1, members={"mp4": (0, len(content))})
    marker = ShardIndex(plan_hash="p", sha256=sha256, bytes=len(content), samples=[sample])
    storage.publish_bytes(content, str(root / name))
    storage.publish_bytes(marker.model_dump_json().encode(), str(root / name.replace(".tar", ".json")))
    return ShardEntry(name=name, samples=1, captions=1, bytes=len(content), sha256=sha256)


@pytest.fixture(autouse=True)
def forget():
    caches._open.cache_clear()


def opened(tmp_path: Path, limit: int = 1000, folder: str = "cache") -> ShardCache:
    return ShardCache(str(tmp_path / "data"), "d" * 64, str(tmp_path / folder), limit)


def test_a_shard_is_downloaded_once_by_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Seen to fail without the lock."""
    entry = make_shard(tmp_path / "data", 0, b"x" * 100)
    downloads, original = [], storage.download

    def slow(url: str, path: Path) -> str:
        downloads.append(url)
        time.sleep(0.1)  # the others come meanwhile
        return original(url, path)

    monkeypatch.setattr(storage, "download", slow)
    shards = [opened(tmp_path) for _ in range(8)]
    threads = [threading.Thread(target=shard.open, args=(entry,)) for shard in shards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([url for url in downloads if url.endswith(".tar")]) == 1
    tar, index = shards[0].open(entry)
    assert tar.read() == b"x" * 100 and index.samples[0].video_id == "a"


def test_a_damaged_shard_is_refused_by_name_and_leaves_nothing_behind(tmp_path: Path):
    """Seen to fail where the sum of what came is not compared."""
    entry = make_shard(tmp_path / "data", 0, b"x" * 100)
    (tmp_path / "data" / entry.name).write_bytes(b"y" * 100)
    with pytest.raises(DataError, match=r"shard-000000.tar is damaged: its sha256 is .* build it again"):
        opened(tmp_path).open(entry)
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_a_marker_of_another_build_is_refused(tmp_path: Path):
    entry = make_shard(tmp_path / "data", 0, b"x" * 100)
    make_shard(tmp_path / "data", 0, b"y" * 100)
    (tmp_path / "data" / entry.name).write_bytes(b"x" * 100)
    with pytest.raises(DataError, match=r"shard-000000.tar: its marker is not the one"):
        opened(tmp_path).open(entry)


def test_a_transfer_that_fails_once_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    entry = make_shard(tmp_path / "data", 0, b"x" * 100)
    original, failures = caches.shards.fetch_shard, [StorageError("the line dropped")]

    def flaky(url: str, entry: ShardEntry, path: Path) -> None:
        if failures:
            raise failures.pop()
        original(url, entry, path)

    monkeypatch.setattr(caches.shards, "fetch_shard", flaky)
    assert opened(tmp_path).open(entry)[0].read() == b"x" * 100


def test_a_shard_that_is_damaged_on_its_way_is_fetched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Seen to fail where the first damaged download is the last."""
    entry = make_shard(tmp_path / "data", 0, b"x" * 100)
    source = tmp_path / "data" / entry.name
    original, contents = caches.shards.fetch_shard, [b"y" * 100, b"x" * 100]

    def flaky(url: str, entry: ShardEntry, path: Path) -> None:
        source.write_bytes(contents.pop(0))
        original(url, entry, path)

    monkeypatch.setattr(caches.shards, "fetch_shard", flaky)
    assert opened(tmp_path).open(entry)[0].read() == b"x" * 100


def test_the_least_recently_used_shards_go_first_and_open_ones_read_on(tmp_path: Path):
    """Seen to fail where nothing goes, the newest go first, or another process's unfinished tar counts."""
    entries = [make_shard(tmp_path / "data", n, bytes([n]) * 100) for n in range(4)]
    cache = opened(tmp_path, limit=250)
    first, _ = cache.open(entries[0])
    unfinished = tmp_path / "cache" / ".tmp-1-shard-000009.tar"  # another process's download
    unfinished.write_bytes(bytes(240))
    for entry in entries[1:]:
        cache.open(entry)
    left = sorted(p.name for p in (tmp_path / "cache").rglob("*.tar"))
    assert left == [unfinished.name, "shard-000002.tar", "shard-000003.tar"]
    assert first.read() == bytes([0]) * 100
    with pytest.raises(StorageError, match=r"data.cache_bytes=50 is less than one shard"):
        opened(tmp_path, limit=50, folder="other").open(entries[0])
