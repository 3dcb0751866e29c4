"""What is not in a dataset: clips that are rejected, with their reasons, and how many may be."""

import os
from pathlib import Path

import pytest

from cluster.local import RayCluster
from common import retry, shards, storage
from common.errors import DataError, RunError
from datasets_prep import build as build_module
from datasets_prep import verify as verify_module
from datasets_prep.build import build, summary
from datasets_prep.verify import rejected_clips, verify
from tests.datasets_prep.builds import GOOD, Annotate, Write, build_custom, load, run
from tests.datasets_prep.conftest import ffmpeg, picture


def test_bad_clips_are_rejected_counted_and_shown(
    annotate: Annotate,
    videos: Path,
    tmp_path: Path,
    ray_local: RayCluster,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = ["empty.mp4", "garbage.mp4", "cut.mp4", "sound.mp4", "nowhere.mp4"]
    lines = [GOOD, *({"video": name, "caption": "x", "split": "train"} for name in bad)]
    output = tmp_path / "out"
    built = build_custom(output, annotate(*lines), videos, "max_rejected_fraction=0.9", "max_missing_fraction=0.2")
    marker = shards.read_marker(str(output), "train/shard-000000.tar")
    assert [s.video_id for s in marker.samples] == ["small.mp4"]
    assert {r.video_id: r.reason for r in marker.rejected} == {
        "empty.mp4": "the file is empty",
        "garbage.mp4": "not a video: moov atom not found",
        "cut.mp4": "not a video: moov atom not found",
        "sound.mp4": "no video stream in it, only sound",
        "nowhere.mp4": "there is no such file in source.videos",
    }
    assert built.dataset.rejected == 5
    text = summary(built, str(output))
    assert "rejected: 5 (2 × not a video: moov atom not found; 1 ×" in text
    assert "train            1           1           1" in text
    assert verify(str(output)) == 1
    capsys.readouterr()
    assert run(verify_module, str(output), "--rejected", monkeypatch=monkeypatch) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 5 and "train/shard-000000.tar,empty.mp4,the file is empty" in listed
    assert run(verify_module, str(tmp_path / "nowhere"), "--rejected", monkeypatch=monkeypatch) == 1


def test_hostile_names_and_files_take_nothing_down(
    annotate: Annotate, videos: Path, tmp_path: Path, ray_local: RayCluster
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    small = (videos / "small.mp4").read_bytes()
    (tmp_path / "secret.mp4").write_bytes(small)
    (folder / "two\nlines.mp4").write_bytes(small)
    (folder / os.fsdecode(b"latin\xe9.mp4")).write_bytes(small)
    huge = picture("4096x2304", 1, 1)  # a small file with large pictures
    ffmpeg(*huge, "-pix_fmt", "yuv420p", str(folder / "huge.mp4"))
    ffmpeg("-f", "lavfi", "-i", "color=size=64x64:rate=1:duration=14400", str(folder / "four_hours.mp4"))
    (folder / "list.mp4").write_text("ffconcat version 1.0\nfile ../secret.mp4\n")  # reads another file
    names = ["../secret.mp4", "two\nlines.mp4", "latin\udce9.mp4", "huge.mp4", "four_hours.mp4", "list.mp4"]
    lines = [{"video": name, "caption": "x", "split": "train"} for name in names]
    few = ["max_rejected_fraction=0.9", "max_missing_fraction=0.5", "video.max_pixels=2000000"]
    built = build_custom(tmp_path / "out", annotate(*lines), folder, *few)
    marker = shards.read_marker(str(tmp_path / "out"), "train/shard-000000.tar")
    assert [s.video_id for s in marker.samples] == ["two\nlines.mp4"]
    reasons = {r.video_id: r.reason for r in marker.rejected}
    assert reasons.pop("list.mp4").startswith(("not a video", "cannot be converted"))
    assert reasons == {
        "../secret.mp4": "there is no such file in source.videos",
        "latin\\udce9.mp4": "there is no such file in source.videos",
        "huge.mp4": "more than video.max_pixels=2000000 in a frame",
        "four_hours.mp4": "longer than video.max_duration_s=1800",
    }
    assert built.dataset.rejected == 5 and verify(str(tmp_path / "out")) == 1


def test_a_decoder_that_hangs_fails_its_shard_after_all_attempts(
    annotate: Annotate, videos: Path, tmp_path: Path, ray_local: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time on the wall says nothing about a clip, so it is not rejected; the same command goes on later."""
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    with pytest.raises(
        RunError, match=r"train/shard-000000.tar could not be made in 5 attempts .*small.mp4: ffmpeg did"
    ):
        build_custom(tmp_path / "out", annotate(GOOD), videos, "video.timeout_s=0.001")
    assert not (tmp_path / "out/dataset.json").exists()
    assert build_custom(tmp_path / "out", annotate(GOOD), videos).dataset.rejected == 0


def test_missing_videos_are_counted_and_refused_before_any_work(
    annotate: Annotate, videos: Path, tmp_path: Path
) -> None:
    lines = [GOOD, {**GOOD, "video": "nowhere.mp4"}]
    with pytest.raises(
        RunError, match=r"of 2 clips 1 have no file \(source.videos=.*: nowhere.mp4\), more than max_missing_fraction"
    ):
        build_custom(tmp_path / "out", annotate(*lines), videos)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.*"))


def test_a_video_without_a_caption_is_in_the_list(
    write: Write, videos: Path, tmp_path: Path, ray_local: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a set whose captions do not cover its ids nothing is lost without a word."""
    names = {"train": "small", "val": "wide", "test": "tall"}
    lists = [f"source.{split}_ids={write(f'{split}.txt', name)}" for split, name in names.items()]
    captions = write("captions.json", {"small": ["one"], "wide": ["two"]})
    arguments = [f"source.captions={captions}", *lists, f"source.videos={videos}", "payload=video"]
    with pytest.raises(RunError, match=r"of 3 clips 1 have no caption \(.*: tall.webm\), more than max_missing"):
        build(load("msvd", tmp_path / "out", *arguments))
    built = build(load("msvd", tmp_path / "out", *arguments, "max_missing_fraction=0.4"))
    assert built.reasons == {"no caption": 1}
    assert list(rejected_clips(str(tmp_path / "out"))) == [
        ("test/shard-000000.tar", shards.Rejected(video_id="tall", reason="no caption"))
    ]
    monkeypatch.chdir(tmp_path)  # a relative path is as good as a full one
    assert verify("out") == verify(str(tmp_path / "out")) == 2


@pytest.mark.parametrize("overrides", [[], ["max_rejected_fraction=1"]])
def test_too_many_rejected_clips_fail_without_dataset_json(
    annotate: Annotate, videos: Path, tmp_path: Path, ray_local: RayCluster, overrides: list[str]
) -> None:
    """Above the limit, or all of them whatever the limit is."""
    lines = [{"video": name, "caption": "x", "split": "train"} for name in ("empty.mp4", "sound.mp4")]
    lines += [] if overrides else [GOOD]
    told = (
        "all 2 clips were rejected" if overrides else "2 of 3 clips were rejected, more than max_rejected_fraction=0.05"
    )
    with pytest.raises(RunError, match=f"{told} .*the file is empty"):
        build_custom(tmp_path / "out", annotate(*lines), videos, *overrides)
    assert not (tmp_path / "out/dataset.json").exists()
    with pytest.raises(DataError, match="its build has not finished"):
        shards.read_dataset(str(tmp_path / "out"))


def test_a_split_without_readable_clips_is_left_out(
    annotate: Annotate, videos: Path, tmp_path: Path, ray_local: RayCluster
) -> None:
    lines = [GOOD, {"video": "empty.mp4", "caption": "x", "split": "val"}]
    built = build_custom(tmp_path / "out", annotate(*lines), videos, "max_rejected_fraction=0.5")
    assert set(built.dataset.splits) == {"train"}


def test_a_video_that_vanishes_is_no_rejected_clip(
    annotate: Annotate, videos: Path, tmp_path: Path, ray_local: RayCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "FIRST_WAIT_S", 0.01)
    real = build_module._claim
    monkeypatch.setattr(build_module, "_claim", lambda *a: (real(*a), (tmp_path / "in/a.mp4").unlink()))
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.mp4").write_bytes((videos / "small.mp4").read_bytes())
    with pytest.raises(storage.StorageError, match="is not seen by node"):
        build_custom(tmp_path / "out", annotate({"video": "a.mp4", "caption": "x"}), tmp_path / "in")
