"""Verify names every damaged shard: its bytes, its members, its marker, dataset.json."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import DataError
from datasets_prep import verify as verify_module
from datasets_prep.verify import verify
from tests.datasets_prep.builds import run


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


def test_verify_needs_a_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(verify_module, str(tmp_path), monkeypatch=monkeypatch) == 1
    assert "holds no dataset.json" in capsys.readouterr().err
    assert run(verify_module, monkeypatch=monkeypatch) == 1
    assert "expected one dataset, got 0" in capsys.readouterr().err
