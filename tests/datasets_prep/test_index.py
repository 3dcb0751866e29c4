"""Tars that someone else wrote become a dataset where they lie, and everything of ours reads it."""

import re
import tarfile
from pathlib import Path

import pytest

from cluster.local import RayCluster
from common import shards, storage
from common.errors import DataError, RunError
from datasets_prep import index as index_module
from datasets_prep import tasks
from datasets_prep.index import index
from datasets_prep.verify import verify
from tests.datasets_prep.builds import contents, files, run
from tests.datasets_prep.conftest import ffmpeg, picture
from tests.datasets_prep.tars import (
    Sample,
    load,
    marker,
    read_by_training,
    tars_of_open_clip,
    tars_of_video2dataset,
    video2dataset,
    write_tar,
)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """2 s of 96x64 pixels at 10 frames per second, one group of pictures, as others encode."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    ffmpeg(*picture("96x64", 10, 2), "-pix_fmt", "yuv420p", str(path))
    return path.read_bytes()


def test_video2dataset_is_indexed_verified_and_trained_on(tmp_path: Path, clip: bytes, ray_local: RayCluster) -> None:
    folder = tmp_path / "data"
    tars_of_video2dataset(folder, clip)
    before = files(folder)
    built = index(load(folder))
    after = files(folder)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == {"00000.json", "00001.json", "dataset.json", "report.html"}
    assert built.dataset.split("train").samples == built.dataset.split("train").captions == 12
    first = marker(folder, "00001.tar").samples[0]
    assert (first.key, first.video_id, first.source_id) == ("00000003_00000", "00000003_00000", "v3")
    assert first.info is not None
    numbers = first.info.num_frames, first.info.fps, first.info.duration_s, first.info.width, first.info.height
    assert numbers == (20, 10.0, 2.0, 96, 64)
    assert [(c.id, c.text) for c in first.info.captions] == [("00000003_00000#0", "clip 3 0")]
    with open(folder / "00001.tar", "rb") as tar:
        assert shards.read_pictures(tar, first) == [clip]
    assert verify(str(folder)) == 12
    trained, evaluated = read_by_training(str(folder), tmp_path / "cache", "train")
    assert len(trained) == 8
    assert trained <= evaluated == set(built_ids(folder))


def built_ids(folder: Path) -> list[str]:
    dataset, _ = shards.read_dataset(str(folder))
    names = [entry.name for split in dataset.splits.values() for entry in split.shards]
    return [s.video_id for name in names for s in marker(folder, name).samples]


def test_open_clip_on_s3_in_folders_named_like_splits(
    s3: str, tmp_path: Path, clip: bytes, ray_local: RayCluster
) -> None:
    tars_of_open_clip(tmp_path / "local", clip)
    for name in ("train/000.tar", "train-more/000.tar", "val/000.tar"):
        storage.publish(tmp_path / "local" / name, f"{s3}/{name}")
    built = index(load(s3))
    assert {name: split.samples for name, split in built.dataset.splits.items()} == {"train": 10, "val": 4}
    assert verify(s3) == 14
    trained, evaluated = read_by_training(s3, tmp_path / "cache", "val")
    assert len(trained) == 8
    assert trained <= {f"{i:04d}" for i in range(10)}
    assert evaluated == {f"{i:04d}" for i in range(4)}
    # The same bytes on any storage, and on any attempt.
    index(load(tmp_path / "local"))
    made = {e.url.removeprefix(s3 + "/"): storage.read(e.url) for e in storage.list_files(s3)}
    assert made == contents(tmp_path / "local")


def test_again_does_only_what_is_missing(
    tmp_path: Path, clip: bytes, ray_local: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars_of_video2dataset(tmp_path, clip)
    index(load(tmp_path))
    before = files(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(tasks.ray, "init", None)  # a finished one starts no Ray
        index(load(tmp_path))
    assert files(tmp_path) == before
    (tmp_path / "00001.json").unlink()
    (tmp_path / "dataset.json").unlink()
    index(load(tmp_path))
    after = files(tmp_path)
    assert contents(tmp_path) == {name: data for name, (_, data) in before.items()}
    assert {n for n in after if after[n][0] != before[n][0]} == {"00001.json", "dataset.json"}
    # Storages list in different orders.
    with monkeypatch.context() as patch:
        listed = list(storage.list_files(str(tmp_path)))
        patch.setattr(storage, "list_files", lambda url: reversed(listed))
        index(load(tmp_path))
    assert files(tmp_path) == after
    # A tar that is new: the markers of the others stay as they are.
    write_tar(tmp_path / "00002.tar", {"00000009_00000": video2dataset(clip, 9)})
    assert index(load(tmp_path)).dataset.split("train").samples == 13
    now = files(tmp_path)
    assert {n for n in after if now[n] != after[n]} == {"dataset.json", "report.html"}
    # A tar that was replaced by a longer one is read again.
    write_tar(tmp_path / "00002.tar", {f"0000000{i}_00000": video2dataset(clip, i) for i in (8, 9)})
    assert index(load(tmp_path)).dataset.split("train").samples == 14
    assert verify(str(tmp_path)) == 14


def test_other_options_replace_markers_and_never_leave_a_wrong_dataset_json(
    tmp_path: Path, clip: bytes, ray_local: RayCluster
) -> None:
    tars_of_video2dataset(tmp_path, clip)
    index(load(tmp_path))
    with pytest.raises(RunError, match=r"12 of 12 samples were rejected.*its json has no text at 'captoin'"):
        index(load(tmp_path, caption="captoin"))
    assert not (tmp_path / "dataset.json").exists()
    index(load(tmp_path, video_ids="tar", split="test"))
    dataset, _ = shards.read_dataset(str(tmp_path))
    assert list(dataset.splits) == ["test"]
    first = marker(tmp_path, "00000.tar").samples[0]
    assert (first.video_id, first.source_id) == ("00000/00000000_00000", "v0")
    assert verify(str(tmp_path)) == 12


def test_samples_without_video_or_caption_are_rejected_with_their_reason(
    tmp_path: Path, clip: bytes, videos: Path, ray_local: RayCluster
) -> None:
    def bad(name: str) -> bytes:
        return (videos / name).read_bytes()

    good = {"mp4": clip, "txt": "good"}
    samples = {
        "good": good,
        "only_json": {"json": {"caption": "x"}},
        "no_text": {"mp4": clip, "txt": " \n"},
        "null_caption": {"mp4": clip, "json": {"caption": None}},
        "bad_json": {"mp4": clip, "txt": "x", "json": b"{"},
        "list_json": {"mp4": clip, "txt": "x", "json": [1]},
        "latin1": {"mp4": clip, "txt": b"caf\xe9"},
        "empty": {**good, "mp4": b""},
        "garbage": {**good, "mp4": bad("garbage.mp4")},
        "cut": {**good, "mp4": bad("cut.mp4")},
        "sound": {**good, "mp4": bad("sound.mp4")},
        # Its index is whole, and its last frames are not there.
        "holes": {**good, "mp4": clip[: len(clip) // 3] + bytes(len(clip) // 3) + clip[len(clip) // 3 * 2 :]},
        "last": good,
    }
    write_tar(tmp_path / "a.tar", samples)
    with pytest.raises(RunError, match=r"\d+ of 13 samples were rejected, more than max_rejected_fraction=0\.05"):
        index(load(tmp_path))
    assert not (tmp_path / "dataset.json").exists()
    built = index(load(tmp_path, max_rejected_fraction=0.95))
    made = marker(tmp_path, "a.tar")
    assert [s.key for s in made.samples] == ["good", "last"]
    reasons = {r.video_id: r.reason for r in made.rejected}
    assert reasons.keys() == samples.keys() - {"good", "last"}
    assert reasons["only_json"] == "no video (mp4, webm, mkv, mov, avi)"
    assert reasons["no_text"] == reasons["null_caption"] == "no caption"
    assert reasons["bad_json"] == "its json is not valid JSON"
    assert reasons["list_json"] == "its json is no object"
    assert reasons["latin1"] == "its txt is not UTF-8"
    assert reasons["empty"] == "the video is empty"
    assert reasons["garbage"] == "cannot be decoded: decord can't open it"
    # No path, no time: equal faults are equal texts, and another attempt gives the same bytes.
    assert not any(re.search(r"/tmp|\.cc|\d\d:\d\d", reason) for reason in reasons.values()), reasons
    assert built.dataset.rejected == built.reasons.total() == 11
    assert verify(str(tmp_path)) == 2
    first = contents(tmp_path)
    (tmp_path / "a.json").unlink()
    index(load(tmp_path, max_rejected_fraction=0.95))
    assert contents(tmp_path) == first


@pytest.mark.parametrize(
    ("sample", "config", "texts"),
    [
        ({"txt": "from txt", "json": {"caption": "from json"}}, {}, ["from txt"]),
        ({"json": {"caption": "from json"}}, {}, ["from json"]),
        ({"json": {"caption": ["one", " two ", ""]}}, {}, ["one", "two"]),
        ({"txt": "from txt", "json": {"title": "asked for"}}, {"caption": "title"}, ["asked for"]),
        ({"json": {"captions": [{"id": "a#0", "text": "ours"}]}}, {}, ["ours"]),
    ],
)
def test_where_captions_come_from(
    tmp_path: Path, clip: bytes, ray_local: RayCluster, sample: Sample, config: dict, texts: list[str]
) -> None:
    write_tar(tmp_path / "a.tar", {"k": {"mp4": clip, **sample}})
    assert index(load(tmp_path, **config)).dataset.split("train").captions == len(texts)
    info = marker(tmp_path, "a.tar").samples[0].info
    assert info is not None
    assert [c.text for c in info.captions] == texts


@pytest.mark.parametrize("name", ["tall.webm", "odd.avi"])
def test_other_containers(tmp_path: Path, videos: Path, ray_local: RayCluster, name: str) -> None:
    suffix = name.partition(".")[2]
    write_tar(tmp_path / "a.tar", {f"{i}": {suffix: (videos / name).read_bytes(), "txt": "x"} for i in range(8)})
    index(load(tmp_path))
    trained, evaluated = read_by_training(str(tmp_path), tmp_path / "cache", "train")
    assert len(trained | evaluated) == 8


def test_our_own_tars_without_their_markers(
    copy: Path,
    dataset: Path,
    ray_local: RayCluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = files(copy)
    for names in ([], ["dataset.json"], ["plan.json"]):
        for name in names:
            (copy / name).unlink()
        refused = run(index_module, str(copy), monkeypatch=monkeypatch)
        message = capsys.readouterr().err
        assert refused == 1
        assert len(message.splitlines()) == 1
        expected = "is the output of datasets_prep.build" if "plan.json" not in names else "and not ours: move it"
        assert expected in message
    assert files(copy).items() <= before.items()
    for path in copy.rglob("*.json"):
        path.unlink()
    built = index(load(copy))
    assert {name: split.samples for name, split in built.dataset.splits.items()} == {"test": 16, "train": 28, "val": 6}
    for entry in built.dataset.split("val").shards:
        indexed, original = marker(copy, entry.name), marker(dataset, entry.name)
        with open(copy / entry.name, "rb") as tar:
            for mine, theirs in zip(indexed.samples, original.samples, strict=True):
                assert mine.members == theirs.members
                assert mine.info == shards.read_info(tar, theirs)
    assert verify(str(copy)) == 50


def test_a_video_id_that_is_there_twice(tmp_path: Path, clip: bytes, ray_local: RayCluster) -> None:
    for name in ("a.tar", "more/a.tar"):
        write_tar(tmp_path / name, {"0": {"mp4": clip, "txt": "x"}})
    with pytest.raises(DataError, match=r"'0' is in a\.tar and again in more/a\.tar, both of split 'train': give"):
        index(load(tmp_path))
    assert not (tmp_path / "dataset.json").exists()
    index(load(tmp_path, video_ids="tar"))
    assert built_ids(tmp_path) == ["a/0", "more/a/0"]
    # Also when nothing is left to be read, and in one tar.
    write_tar(tmp_path / "b.tar", {k: {"mp4": clip, "txt": "x", "json": {"video_id": "same"}} for k in "01"})
    (tmp_path / "more/a.tar").unlink()
    for _ in range(2):
        with pytest.raises(DataError, match=r"'same' is in b\.tar and again in b\.tar"):
            index(load(tmp_path))


def test_tars_made_by_hand(tmp_path: Path, clip: bytes, ray_local: RayCluster) -> None:
    """`tar cf a.tar .`: names begin with ./, folders are members, and a README has no suffix."""
    (tmp_path / "in/sub.dir").mkdir(parents=True)
    for stem in ("a", "sub.dir/b"):
        (tmp_path / f"in/{stem}.MP4").write_bytes(clip)
        (tmp_path / f"in/{stem}.txt").write_text("x")
    (tmp_path / "in/README").write_text("x")
    (tmp_path / "out").mkdir()
    with tarfile.open(tmp_path / "out/a.tar", "w") as archive:
        archive.add(tmp_path / "in", arcname=".")
    index(load(tmp_path / "out"))
    assert sorted(built_ids(tmp_path / "out")) == ["a", "sub.dir/b"]
    assert verify(str(tmp_path / "out")) == 2


def spoil(folder: Path, how: str) -> list[str]:
    """Make one thing wrong; the arguments of the command."""
    tar = folder / "00001.tar"
    if how == "cut":
        tar.write_bytes(tar.read_bytes()[:4000])
    elif how == "twice":
        write_tar(tar, {"a": {"txt": "x"}})
        with tarfile.open(tar, "a") as archive:
            archive.add(folder / "00000.parquet", arcname="a.txt")
    elif how == "foreign":
        (folder / "00001.json").write_text('{"count": 3}')
    elif how == "dataset.json":
        (folder / "dataset.json").write_text('{"name": "theirs"}')
    elif how == "report.html":
        (folder / "report.html").write_text("<html>theirs")
    elif how == "dataset.tar":
        tar.rename(folder / "dataset.tar")
    elif how == "no tars":
        for path in folder.glob("*.tar"):
            path.unlink()
    return [str(folder), *(["videoids=tar"] if how == "key" else [])]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("cut", "00001.tar is no whole tar"),
        ("twice", "00001.tar is no whole tar (it holds a.txt twice): move it away"),
        ("foreign", "00001.json is in the place of the marker of 00001.tar and not ours: move it"),
        ("dataset.json", "holds a dataset.json that is not ours: move it away"),
        ("report.html", "report.html is in the place of our report and not ours: move it away"),
        ("dataset.tar", "dataset.tar: rename it"),
        ("no tars", "there is no .tar in"),
        ("key", "unknown key 'videoids', did you mean 'video_ids'?"),
    ],
)
def test_a_mistake_is_one_line_and_changes_no_file_of_theirs(
    tmp_path: Path,
    clip: bytes,
    ray_local: RayCluster,
    how: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tars_of_video2dataset(tmp_path, clip)
    arguments = spoil(tmp_path, how)
    before = files(tmp_path)
    assert run(index_module, *arguments, monkeypatch=monkeypatch) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert words in told[0]
    after = files(tmp_path)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() <= {"00000.json"}


def test_the_command(
    tmp_path: Path,
    clip: bytes,
    ray_local: RayCluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tars_of_open_clip(tmp_path, clip)
    assert run(index_module, str(tmp_path), "workers=1", monkeypatch=monkeypatch) == 0
    assert "train            2          10          10" in capsys.readouterr().out
    assert run(index_module, str(tmp_path), "split=x", "--print", monkeypatch=monkeypatch) == 0
    assert "split: x" in capsys.readouterr().out
    assert run(index_module, "--help", monkeypatch=monkeypatch) == 0
    assert "video_ids" in capsys.readouterr().out
    assert run(index_module, "split=x", monkeypatch=monkeypatch) == 1
    assert "no folder given" in capsys.readouterr().err
