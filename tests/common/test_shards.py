"""The shard contract: what is written is read back, and damage is told, never read."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import pytest

from common import shards, storage
from common.errors import DataError, NotFoundError
from common.shards import Caption, DatasetIndex, Rejected, SampleIndex, SampleInfo, ShardEntry, ShardIndex, SplitIndex

INFO = SampleInfo(
    video_id="v1",
    source_id="s1",
    captions=[Caption(id="v1#0", text="a dog – “runs”")],
    duration_s=1.5,
    fps=12.0,
    num_frames=18,
    width=64,
    height=48,
)
PLAN_HASH = "0" * 64


@pytest.fixture(params=["local", "s3"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A dataset of one shard with one sample, written as the contract says: tar, marker, dataset.json."""
    url = str(tmp_path / "dataset") if request.param == "local" else request.getfixturevalue("s3")
    name = shards.shard_name("train", 0)
    path = tmp_path / "shard.tar"
    members = {"mp4": b"not really a video", "json": INFO.model_dump_json().encode()}
    with tarfile.open(path, "w") as tar:
        for suffix, data in members.items():
            header = tarfile.TarInfo(f"v1.{suffix}")
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    with tarfile.open(path) as tar:
        places = {m.name.partition(".")[2]: (m.offset_data, m.size) for m in tar.getmembers()}
    sample = SampleIndex(key="v1", video_id="v1", source_id="s1", num_captions=1, members=places)
    sha256, size = shards.sha256_of(path), path.stat().st_size
    rejected = [Rejected(video_id="v2", reason="no video stream")]
    marker = ShardIndex(plan_hash=PLAN_HASH, sha256=sha256, bytes=size, samples=[sample], rejected=rejected)
    entry = ShardEntry(name=name, samples=1, captions=1, bytes=size, sha256=sha256)
    index = DatasetIndex(payload="video", plan_hash=PLAN_HASH, splits={"train": SplitIndex(shards=[entry])}, rejected=1)
    storage.publish(path, storage.join(url, name))
    storage.publish_bytes(marker.model_dump_json().encode(), storage.join(url, shards.marker_name(name)))
    storage.publish_bytes(index.model_dump_json().encode(), storage.join(url, "dataset.json"))
    return url


def test_round_trip(dataset: str, tmp_path: Path) -> None:
    index, sha256 = shards.read_dataset(dataset)
    assert sha256 == hashlib.sha256(storage.read(f"{dataset}/dataset.json")).hexdigest()
    split = index.split("train")
    assert (split.samples, split.captions) == (1, 1)
    entry = split.shards[0]
    marker = shards.read_marker(dataset, entry.name)
    assert marker.rejected[0].reason == "no video stream"
    shards.fetch_shard(dataset, entry, tmp_path / "cache" / "copy.tar")
    with open(tmp_path / "cache" / "copy.tar", "rb") as tar:
        assert shards.read_member(tar, marker.samples[0], "mp4") == b"not really a video"
        assert shards.read_info(tar, marker.samples[0]) == INFO


def test_an_unknown_split_is_told_with_those_that_exist(dataset: str) -> None:
    with pytest.raises(DataError, match=r"no split 'val'; it has train"):
        shards.read_dataset(dataset)[0].split("val")


def test_a_dataset_that_is_not_finished_is_told(dataset: str) -> None:
    storage.delete(f"{dataset}/dataset.json")
    with pytest.raises(DataError, match="build has not finished"):
        shards.read_dataset(dataset)


def test_a_missing_bucket_is_not_called_an_unfinished_build(s3: str) -> None:
    with pytest.raises(NotFoundError, match="'no-such-bucket' does not exist"):
        shards.read_dataset("s3://no-such-bucket/dataset")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"\xff" + data,
        lambda data: json.dumps({**json.loads(data), "surprise": 1}).encode(),
        lambda data: json.dumps({k: v for k, v in json.loads(data).items() if k != "plan_hash"}).encode(),
    ],
)
def test_damaged_json_is_told(dataset: str, damage: "object") -> None:
    assert callable(damage)
    marker = f"{dataset}/train/shard-000000.json"
    for url, read in (
        (marker, lambda: shards.read_marker(dataset, "train/shard-000000.tar")),
        (f"{dataset}/dataset.json", lambda: shards.read_dataset(dataset)),
    ):
        storage.publish_bytes(damage(storage.read(url)), url)
        with pytest.raises(DataError, match=r"\.json is damaged") as told:
            read()
        assert url in str(told.value) and "\n" not in str(told.value)


def test_another_format_is_refused(dataset: str) -> None:
    url = f"{dataset}/dataset.json"
    storage.publish_bytes(json.dumps({**json.loads(storage.read(url)), "format": 2}).encode(), url)
    with pytest.raises(DataError, match="has format 2, this program reads 1"):
        shards.read_dataset(dataset)


def test_a_shard_of_other_bytes_is_refused_and_not_kept(dataset: str, tmp_path: Path) -> None:
    entry = shards.read_dataset(dataset)[0].split("train").shards[0]
    url, copy = f"{dataset}/{entry.name}", tmp_path / "cache" / "copy.tar"
    data = bytearray(storage.read(url))
    data[600] ^= 1
    storage.publish_bytes(bytes(data), url)
    with pytest.raises(DataError, match=r"shard-000000\.tar is damaged: its sha256"):
        shards.fetch_shard(dataset, entry, copy)
    assert list(copy.parent.iterdir()) == []


def test_a_shard_that_is_gone_is_told(dataset: str, tmp_path: Path) -> None:
    entry = shards.read_dataset(dataset)[0].split("train").shards[0]
    storage.delete(f"{dataset}/{entry.name}")
    with pytest.raises(NotFoundError, match="shard-000000"):
        shards.fetch_shard(dataset, entry, tmp_path / "copy.tar")
    with pytest.raises(NotFoundError, match="shard-000007"):
        shards.read_marker(dataset, shards.shard_name("train", 7))
