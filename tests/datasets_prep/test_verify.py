"""Verify names every damaged shard: its bytes, its members, its marker, dataset.json."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.local import RayCluster
from common import shards
from common.errors import DataError
from datasets_prep import verify as verify_module
from datasets_prep.verify import verify
from tests.datasets_prep.builds import build_custom, contents, files, run


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[5000] ^= 1
    path.write_bytes(data[:-1024] if how == "cut" else data)
    if how == "remove":
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
def test_verify_names_the_damaged_shard(
    copy: Path, how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(verify_module, str(copy), monkeypatch=monkeypatch) == 0
    damage(copy / "train/shard-000001.tar", how)
    capsys.readouterr()
    assert run(verify_module, str(copy), monkeypatch=monkeypatch) == 1
    assert "error: 1 of 7 shards are damaged: train/shard-000001.tar" in capsys.readouterr().err


def edit(path: Path, change: Callable[[dict], object]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def exchange(marker: dict) -> None:
    """Offsets of two videos: the tar is whole, but the index leads to the wrong clip."""
    first, second = (sample["members"] for sample in marker["samples"][:2])
    first["mp4"], second["mp4"] = second["mp4"], first["mp4"]


@pytest.mark.parametrize(
    "change",
    [
        exchange,
        lambda marker: marker["samples"].pop(),
        lambda marker: marker["samples"][0].update(video_id="another"),
        lambda marker: marker.update(sha256="0" * 64),
        lambda marker: marker.update(plan_hash="0" * 64),
    ],
)
def test_verify_compares_markers_too(copy: Path, change: Callable[[dict], object]) -> None:
    edit(copy / "val/shard-000000.json", change)
    with pytest.raises(DataError, match=r"1 of 7 shards are damaged: val/shard-000000\.tar"):
        verify(str(copy))


def test_verify_finds_a_video_that_is_there_twice(copy: Path) -> None:
    def twice(dataset: dict) -> None:
        entries = dataset["splits"]["train"]["shards"]
        entries.append(entries[0])

    edit(copy / "dataset.json", twice)
    with pytest.raises(DataError, match=r"damaged: train/shard-000000\.tar"):
        verify(str(copy))


def test_repair_builds_only_what_is_bad(
    copy: Path, dataset: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(verify_module, str(copy), "--repair", monkeypatch=monkeypatch) == 0
    assert "nothing to repair" in capsys.readouterr().out
    damage(copy / "train/shard-000001.tar", "flip")
    damage(copy / "test/shard-000000.tar", "remove")
    before = files(copy)
    assert run(verify_module, str(copy), "--repair", monkeypatch=monkeypatch) == 0
    assert "built again: test/shard-000000.tar, train/shard-000001.tar" in capsys.readouterr().out
    assert contents(copy) == contents(dataset)
    assert before["train/shard-000000.tar"] == files(copy)["train/shard-000000.tar"]  # not written again
    (copy / "config.yaml").unlink()
    damage(copy / "train/shard-000001.tar", "cut")
    assert run(verify_module, str(copy), "--repair", monkeypatch=monkeypatch) == 1
    assert "holds no config.yaml" in capsys.readouterr().err


def test_repair_works_from_any_folder(
    videos: Path, tmp_path: Path, ray_local: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.csv").write_text("video,caption,split\nsmall.mp4,x,train\n")
    (tmp_path / "videos").symlink_to(videos)
    monkeypatch.chdir(tmp_path)
    build_custom("out", "a.csv", Path("videos"))
    before = contents(tmp_path / "out")
    damage(tmp_path / "out/train/shard-000000.tar", "flip")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run(verify_module, "../out", "--repair", monkeypatch=monkeypatch) == 0
    assert contents(tmp_path / "out") == before


def rewrite(copy: Path, name: str, change: Callable[[bytearray, dict], object]) -> None:
    """Change a tar's bytes and make all indexes agree with it."""
    data, marker = bytearray((copy / name).read_bytes()), json.loads((copy / shards.marker_name(name)).read_text())
    change(data, marker)
    (copy / name).write_bytes(data)
    marker["sha256"] = shards.sha256_of(copy / name)
    (copy / shards.marker_name(name)).write_text(json.dumps(marker))

    def entry(dataset: dict) -> None:
        for split in dataset["splits"].values():
            for one in split["shards"]:
                one["sha256"] = marker["sha256"] if one["name"] == name else one["sha256"]

    edit(copy / "dataset.json", entry)


def test_verify_finds_a_video_that_is_in_two_shards(copy: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ["train/shard-000001.tar", "train/shard-000003.tar"]
    first, second = (shards.read_marker(str(copy), name).samples[0].video_id for name in names)
    assert len(first) == len(second)

    def rename(data: bytearray, marker: dict) -> None:
        marker["samples"][0]["video_id"] = first
        offset, size = marker["samples"][0]["members"]["json"]
        data[offset : offset + size] = data[offset : offset + size].replace(second.encode(), first.encode())

    rewrite(copy, names[1], rename)
    with pytest.raises(DataError, match=r"1 of 7 shards are damaged: train/shard-000003\.tar"):
        verify(str(copy))
    assert f"video {first!r} is also in train/shard-000001.tar" in caplog.text


def test_verify_decodes_every_video(copy: Path) -> None:
    def spoil(data: bytearray, marker: dict) -> None:
        offset, size = marker["samples"][3]["members"]["mp4"]
        data[offset : offset + size] = bytes(size)

    rewrite(copy, "train/shard-000001.tar", spoil)
    with pytest.raises(DataError, match=r"damaged: train/shard-000001\.tar"):
        verify(str(copy))


def test_verify_proves_the_sums(copy: Path) -> None:
    edit(copy / "plan.json", lambda plan: plan.update(clips=51))
    with pytest.raises(DataError, match="of 51 planned clips 50 are in shards and 0 rejected by markers"):
        verify(str(copy))


def test_verify_needs_a_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(verify_module, str(tmp_path), monkeypatch=monkeypatch) == 1
    assert "holds no dataset.json" in capsys.readouterr().err
    assert run(verify_module, monkeypatch=monkeypatch) == 1
    assert "expected one dataset, got 0" in capsys.readouterr().err
