"""Builds as a user starts them, on a real Ray: shards, resume, bad input."""

import json
from pathlib import Path

import pytest
import webdataset

from cluster.local import RayCluster
from common import config as configs
from common import shards, storage
from common.errors import DataError, RunError
from datasets_prep import build as build_module
from datasets_prep.build import build
from datasets_prep.verify import verify
from tests import entry
from tests.datasets_prep.builds import GOOD, Annotate, build_custom, build_shapes, contents, files, load, run


def test_indexes_lead_to_every_member(dataset: Path) -> None:
    index, _ = shards.read_dataset(str(dataset))
    assert {name: (len(s.shards), s.samples, s.captions) for name, s in index.splits.items()} == {
        "test": (2, 16, 16),
        "train": (4, 28, 28),
        "val": (1, 6, 6),
    }
    names = {entry.name for split in index.splits.values() for entry in split.shards}
    assert names | {shards.marker_name(n) for n in names} | {
        "plan.json",
        "dataset.json",
        "config.yaml",
        "report.html",
    } == set(files(dataset))
    for name in names:
        marker = shards.read_marker(str(dataset), name)
        assert marker.plan_hash == index.plan_hash
        with open(dataset / name, "rb") as tar:
            for sample in marker.samples:
                info = shards.read_info(tar, sample)
                assert (info.video_id, info.num_frames, info.fps, info.width) == (sample.video_id, 30, 10.0, 64)
                assert shards.read_member(tar, sample, "mp4")[4:8] == b"ftyp"
    assert verify(str(dataset)) == 50


def test_webdataset_reads_every_shard_as_it_is(dataset: Path) -> None:
    seen = {}
    for tar in sorted(dataset.rglob("*.tar")):
        for sample in webdataset.WebDataset(str(tar), shardshuffle=False).decode():
            seen[sample["json"]["video_id"]] = sample["json"]["captions"][0]["text"]
            assert sample["mp4"][4:8] == b"ftyp"
    assert len(seen) == 50
    assert all("a" in caption for caption in seen.values())


def test_twins_stay_together(dataset: Path) -> None:
    for tar in dataset.rglob("*.tar"):
        marker = shards.read_marker(str(dataset), str(tar.relative_to(dataset)))
        sources = [s.source_id for s in marker.samples]
        assert all(sources.count(source) == 2 for source in sources)


def test_twice_the_same_bytes(dataset: Path, shapes: Path, tmp_path: Path) -> None:
    build_shapes(tmp_path / "other", shapes, "workers=1")
    assert contents(tmp_path / "other") == contents(dataset)


def test_resume_builds_only_what_is_missing(copy: Path, dataset: Path, shapes: Path) -> None:
    before = files(copy)
    (copy / "train/shard-000002.json").unlink()  # killed between the tar and its marker
    (copy / "test/shard-000001.tar").write_bytes(b"cut short")
    (copy / "dataset.json").unlink()
    build_shapes(copy, shapes)
    after = files(copy)
    assert contents(copy) == contents(dataset)
    written = {name for name in after if after[name][0] != before[name][0]}
    assert written == {
        *("train/shard-000002.tar", "train/shard-000002.json", "test/shard-000001.tar", "test/shard-000001.json"),
        *("config.yaml", "dataset.json", "report.html"),
    }


def test_a_finished_build_says_so_and_needs_no_ray(copy: Path, dataset: Path, shapes: Path) -> None:
    numbers = ["source.num_pairs=14", "source.val_pairs=3", "source.test_pairs=8"]
    arguments = ["tiny", f"output={copy}", f"source.videos={shapes}", *numbers]
    finished = entry.run("datasets_prep.build", *arguments, env={"RAY_ADDRESS": "127.0.0.1:1"})
    assert finished.code == 0, finished.err
    assert "7 of 7 shards are there already" in finished.err
    assert "train            4          28          28" in finished.out
    assert contents(copy) == contents(dataset)


def test_another_plan_at_the_same_output_is_refused(copy: Path, shapes: Path) -> None:
    before = files(copy)
    with pytest.raises(RunError, match=r"another plan \(changed: video\.crf\)"):
        build_shapes(copy, shapes, "video.crf=30")
    with pytest.raises(RunError, match=r"changed: seed"):
        build_shapes(copy, shapes, "seed=3")
    assert files(copy) == before
    build_shapes(copy, shapes, "workers=1", "video.timeout_s=50", "max_rejected_fraction=0.2")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no annotations"),
        (['{"video"'], "line 1: not valid JSON"),
        ([{"video": "small.mp4"}], "line 1: no 'caption'"),
    ],
)
def test_bad_annotations_are_one_line(
    annotate: Annotate,
    videos: Path,
    tmp_path: Path,
    lines: list[dict | str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = [f"source.annotations={annotate(*lines)}", f"source.videos={videos}", f"output={tmp_path / 'out'}"]
    assert run(build_module, "custom", *source, monkeypatch=monkeypatch) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert told[0].startswith("error: ")
    assert message in told[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny"], "output is required: give output="),
        (["tinny", "output=x"], "unknown preset 'tinny', did you mean 'tiny'?"),
        (["tiny", "output=x", "video.crff=3"], "unknown key 'video.crff', did you mean 'video.crf'?"),
        (["tiny", "output=x", "source.name=shapes"], "source.name: 'shapes' is not one of"),
        (["custom", "output=x"], "source.annotations is required"),
        (
            ["custom", "output=x", "source.annotations=a", "source.videos=b", "source.val_fraction=0.95"],
            "source.val_fraction=0.95 and source.test_fraction=0.1 are more than 1",
        ),
    ],
)
def test_bad_configs_are_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(build_module, *arguments, monkeypatch=monkeypatch) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert message in told[0]


@pytest.mark.parametrize("override", ["cpus_per_task=1000", "video.threads=1000"])
def test_cpus_that_no_node_has(
    annotate: Annotate, videos: Path, tmp_path: Path, ray_local: RayCluster, override: str
) -> None:
    """A task asks for as many as its ffmpeg has threads."""
    with pytest.raises(configs.ConfigError, match=r"a task of 1000 CPUs fits on no Ray node: lower cpus_per_task"):
        build_custom(tmp_path / "out", annotate(GOOD), videos, override)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["output=data"], "output=data"),
        (["output=/data", "source.videos=v"], "source.videos=v"),
        (["output=/data", "source.annotations=a.csv"], "source.annotations=a.csv"),
    ],
)
def test_a_job_refuses_a_relative_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], told: str
) -> None:
    (tmp_path / "_ray_pkg_0").mkdir()
    monkeypatch.chdir(tmp_path / "_ray_pkg_0")
    config = load("custom", "/out", "source.annotations=/a.csv", "source.videos=/v", *overrides)
    with pytest.raises(configs.ConfigError, match=f"^{told} is relative"):
        build(config)


def test_real_web_videos(annotate: Annotate, tmp_path: Path, shared: Path, ray_local: RayCluster) -> None:
    records = json.loads((shared / "data/web_video/captions.json").read_text())[:6]
    lines = [{"video": r["file"].partition("/")[2], "captions": r["captions"]} for r in records]
    built = build_custom(tmp_path / "out", annotate(*lines), shared / "data/web_video")
    assert sum(s.samples for s in built.dataset.splits.values()) == 6
    assert built.dataset.rejected == 0
    assert verify(str(tmp_path / "out")) == 6


def test_shards_of_jpegs_are_about_as_large_as_asked(
    annotate: Annotate, tmp_path: Path, shared: Path, ray_local: RayCluster
) -> None:
    """By the JPEGs' usual size, and not by that of the videos, which here are a sixth of it."""
    records = json.loads((shared / "data/web_video/captions.json").read_text())[:9]
    lines = [{"video": Path(r["file"]).name, "captions": r["captions"], "split": "train"} for r in records]
    source = [f"source.annotations={annotate(*lines)}", f"source.videos={shared / 'data/web_video/panda70m'}"]
    built = build(load("custom", tmp_path / "out", *source, "shards.max_bytes=2000000", "video.short_side=224"))
    sizes = [shard.bytes for shard in built.dataset.split("train").shards]
    assert len(sizes) == 3 and 3_000_000 > max(sizes) > 1_000_000


def test_s3_gives_the_same_dataset_and_resumes(s3: str, dataset: Path, shapes: Path) -> None:
    build_shapes(s3, shapes)

    def objects() -> dict[str, bytes]:
        return {e.url.removeprefix(s3 + "/"): storage.read(e.url) for e in storage.list_files(s3)}

    assert objects() == contents(dataset)
    storage.delete(f"{s3}/val/shard-000000.json")
    storage.publish_bytes(b"cut short", f"{s3}/test/shard-000000.tar")
    with pytest.raises(DataError, match=r"2 of 7 shards are damaged: test/shard-000000\.tar, val/shard-000000\.tar"):
        verify(s3)
    build_shapes(s3, shapes)
    assert objects() == contents(dataset)
    assert verify(s3) == 50
    with pytest.raises(RunError, match="another plan"):
        build_shapes(s3, shapes, "video.gop=3")


def test_annotations_and_videos_on_s3(s3: str, videos: Path, tmp_path: Path, ray_local: RayCluster) -> None:
    for name in ("small.mp4", "empty.mp4"):
        storage.publish(videos / name, f"{s3}/in/{name}")
    lines = [json.dumps(line) for line in (GOOD, {**GOOD, "video": "empty.mp4"}, {**GOOD, "video": "nowhere.mp4"})]
    storage.publish_bytes("\n".join(lines).encode(), f"{s3}/annotations.jsonl")
    overrides = [f"source.annotations={s3}/annotations.jsonl", f"source.videos={s3}/in"]
    overrides += ["max_rejected_fraction=0.7", "max_missing_fraction=0.5"]
    built = build(load("custom", tmp_path / "out", *overrides))
    assert set(built.reasons) == {"the file is empty", "there is no such file in source.videos"}
    assert built.dataset.split("train").samples == 1 and built.dataset.payload == "frames"


def test_a_missing_bucket_is_one_line(
    s3: str, shapes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["tiny", f"source.videos={shapes}", "output=s3://no-such-bucket/x"]
    assert run(build_module, *arguments, monkeypatch=monkeypatch) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1
    assert "bucket 'no-such-bucket' does not exist" in told[0]
