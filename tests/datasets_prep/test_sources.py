"""Every benchmark's source: on the real annotation files where the folder `shared` has them, else on their form."""

import csv
import hashlib
import io
import json
import os
import pickle
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common import config as configs
from common import storage
from common.errors import ConfigError, DataError, NotFoundError, StorageError
from datasets_prep.benchmarks import (
    ActivityNetConfig,
    DidemoConfig,
    LsmdcConfig,
    MsrvttConfig,
    MsvdConfig,
    TableConfig,
    VatexConfig,
)
from datasets_prep.config import PRESETS, BuildConfig, ShardConfig, SourceConfig
from datasets_prep.plan import Clip, make_plan
from datasets_prep.sources import SOURCES, lsmdc

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a text, bytes or JSON value; the file's path."""

    def to(name: str, content: Any) -> str:
        path = tmp_path / name
        data = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return str(path)

    return to


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., str]:
    """Lay empty-looking videos of 100 bytes; their folder."""

    def lay(*names: str) -> str:
        for name in names:
            (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "videos" / name).write_bytes(b"x" * 100)
        return str(tmp_path / "videos")

    return lay


def read(config: Any) -> list[Clip]:
    """The clips, as a build takes them: they make a plan."""
    clips = list(SOURCES[config.name](config))
    make_plan(clips, ShardConfig(), 0, {})
    return clips


def by_id(config: Any) -> dict[str, Clip]:
    return {clip.video_id: clip for clip in read(config)}


def counts(clips: list[Clip]) -> dict[str, int]:
    return dict(Counter(clip.split for clip in clips))


def captions(clips: list[Clip]) -> dict[str, int]:
    total = Counter[str]()
    for clip in clips:
        total[clip.split] += len(clip.captions)
    return dict(total)


def in_val(source_id: str, share: float = 0.05) -> bool:
    """The rule as docs/datasets.md has it."""
    return int.from_bytes(hashlib.sha256(source_id.encode()).digest()[:8], "big") < share * 2**64


# MSR-VTT


def msrvtt_json(ids: list[str], per_video: int = 20, urls: dict[str, str] | None = None) -> dict[str, Any]:
    """MSRVTT_data.json in its exact form."""
    official = {i: "train" if n < 6513 else "validate" if n < 7010 else "test" for n, i in enumerate(ids)}
    return {
        "info": {"contributor": "Microsoft MSM group"},
        "videos": [
            {
                "category": 9,
                "url": (urls or {}).get(i, f"https://www.youtube.com/watch?v={i}"),
                "video_id": i,
                "start time": 137.72,
                "end time": 149.44,
                "split": official[i],
                "id": n,
            }
            for n, i in enumerate(ids)
        ],
        "sentences": [
            {"caption": f"caption {k} of  {i} ", "video_id": i, "sen_id": n * per_video + k}
            for k in range(per_video)
            for n, i in enumerate(ids)
        ],
    }


ALL = [f"video{i}" for i in range(10_000)]


@pytest.mark.parametrize(("protocol", "trained"), [("9k", 9000), ("7k", 7010)])
def test_msrvtt_1k_a(protocol: Any, trained: int, shared: Path, write: Write, put: Write) -> None:
    folder = shared / "annotations" / "MSRVTT"
    config = MsrvttConfig(
        protocol=protocol,
        captions=write("MSRVTT_data.json", msrvtt_json(ALL)),
        train_ids=str(folder / f"MSRVTT_train.{protocol}.csv"),
        test_pairs=str(folder / "MSRVTT_JSFUSION_test.csv"),
        videos=put("video0.mp4", "test/video9770.avi"),
    )
    clips = read(config)
    found = counts(clips)
    assert found["train"] + found["val"] == trained
    assert found["test"] == 1000
    assert 0.04 < found["val"] / trained < 0.06
    assert {len(c.captions) for c in clips if c.split != "test"} == {20}
    assert sum(captions(clips).values()) == 20 * trained + 1000
    named = {c.video_id: c for c in clips}
    assert named["video0"].captions[3] == "caption 3 of video0"
    assert named["video0"][4:] == ("video0.mp4", None, None, 100)
    assert named["video9770"].captions == ("a person is connecting something to system",)
    assert named["video9770"].video == "test/video9770.avi"
    assert (named["video1"].video, named["video1"].size) == ("video1", None)
    assert all((c.split == "val") == in_val(c.source_id) for c in clips if c.split != "test")
    whole = counts(read(config.model_copy(update={"carve_val": 0.0})))
    assert whole == {"train": trained, "test": 1000}


def small_msrvtt(write: Write, put: Write, **changes: Any) -> MsrvttConfig:
    values = {
        "protocol": "9k",
        "captions": write("data.json", msrvtt_json(ALL[:60], 2)),
        "train_ids": write("train.csv", "video_id\n" + "".join(f"video{i}\n" for i in range(50))),
        "test_pairs": write(
            "test.csv",
            "key,vid_key,video_id,sentence\n" + "".join(f"ret{i},msr{i},video{i},s\n" for i in range(50, 60)),
        ),
        "videos": put("video0.mp4"),
        **changes,
    }
    return MsrvttConfig(**values)


def test_msrvtt_full(write: Write, put: Write, caplog: pytest.LogCaptureFixture) -> None:
    config = MsrvttConfig(protocol="full", captions=write("a.json", msrvtt_json(ALL, 2)), videos=put("video0.mp4"))
    assert counts(read(config)) == {"train": 6513, "val": 497, "test": 2990}
    assert "to train on" not in caplog.text
    whole = msrvtt_json(ALL, 2)
    parts = []
    for splits in ({"train", "validate"}, {"test"}):
        videos = [v for v in whole["videos"] if v["split"] in splits]
        ids = {v["video_id"] for v in videos}
        parts.append({"videos": videos, "sentences": [s for s in whole["sentences"] if s["video_id"] in ids]})
    first, second = (write(f"{i}.json", part) for i, part in enumerate(parts))
    assert read(config.model_copy(update={"captions": first, "test_captions": second})) == read(config)
    read(config.model_copy(update={"captions": first}))
    assert "MSR-VTT full has 7010 videos to train on and 2990 to test on; these files have 7010 and 0" in caplog.text


def test_clips_of_one_web_video_are_carved_together(write: Write, put: Write) -> None:
    urls = {f"video{i}": f" https://youtube.com/watch?v={i // 5} " for i in range(60)}
    config = small_msrvtt(write, put, captions=write("a.json", msrvtt_json(ALL[:60], 1, urls)), carve_val=0.5)
    splits: dict[str, set[str]] = {}
    for clip in read(config):
        splits.setdefault(clip.source_id, set()).add(clip.split)
    assert set(map(frozenset, splits.values())) == {frozenset({s}) for s in ("train", "val", "test")}
    assert "https://youtube.com/watch?v=3" in splits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"captions": "[1]"}, "is not MSR-VTT's JSON: expected"),
        ({"captions": '{"sentences": [{"caption": "x"}]}'}, "is not MSR-VTT's JSON"),
        ({"captions": '{"sentences": ['}, "is not JSON"),
        ({"train_ids": "video_id\n"}, "lists no video: expected one id a line"),
        ({"train_ids": "video_id\nvideo0\nvideo9999\n"}, r"1 videos of .* have no caption in .* \(video9999\): give"),
        ({"train_ids": "video_id\nvideo0\nvideo50\n"}, "'video50' is in (train|val) and in test: remove it"),
        ({"test_pairs": "key,video_id\na,b\n"}, "has no column 'sentence', only key, video_id: is it the right file"),
        ({"test_pairs": "video_id,sentence\nvideo50\n"}, "line 2: 1 values for 2 columns"),
    ],
)
def test_msrvtt_mistakes(write: Write, put: Write, change: dict[str, str], message: str) -> None:
    changes = {key: write(f"wrong{'.json' if key == 'captions' else '.csv'}", text) for key, text in change.items()}
    with pytest.raises(DataError, match=message) as caught:
        read(small_msrvtt(write, put, **changes))
    assert "\n" not in str(caught.value)


def test_msrvtt_needs_the_files_of_its_protocol() -> None:
    for values, message in (
        (["protocol=9k", "train_ids=a"], "source.protocol=9k needs source.train_ids and source.test_pairs: MSRVTT_tr"),
        (["protocol=full", "train_ids=a"], "leave out source.train_ids"),
        (["protocol=8k"], "source.protocol"),
    ):
        overrides = [f"source.{v}" for v in ("name=msrvtt", "captions=a", "videos=b", *values)]
        with pytest.raises(ConfigError, match=re.escape(message)):
            configs.load(BuildConfig, "msrvtt_9k", ["output=o", *overrides], PRESETS)


# MSVD


def test_msvd_counts(shared: Path, put: Write) -> None:
    folder = shared / "annotations" / "MSVD"
    config = MsvdConfig(
        captions=str(folder / "captions_msvd.json"),
        train_ids=str(folder / "train_list.txt"),
        val_ids=str(folder / "val_list.txt"),
        test_ids=str(folder / "test_list.txt"),
        videos=put("YouTubeClips/-4wsuPCjDBc_5_15.avi"),
    )
    clips = read(config)
    assert counts(clips) == {"train": 1200, "val": 100, "test": 670}
    assert captions(clips) == {"train": 48_774, "val": 4_290, "test": 27_763}
    first = clips[0]
    assert (first.video_id, first.source_id) == ("-4wsuPCjDBc_5_15", "-4wsuPCjDBc")
    assert (first.video, first.size) == ("YouTubeClips/-4wsuPCjDBc_5_15.avi", 100)


def msvd(write: Write, put: Write, captions_file: str) -> MsvdConfig:
    lists = {f"{s}_ids": write(f"{s}.txt", text) for s, text in (("train", "a_1_2\nb_3_4"), ("val", "c_1_2\n\n"))}
    return MsvdConfig(captions=captions_file, test_ids=write("t.txt", "d_1_2\n"), videos=put("a_1_2.avi"), **lists)


WORDS = {f"{i}": [["a", "man"], ["a", "man"], ["café"]] for i in ("a_1_2", "b_3_4", "c_1_2", "d_1_2")}


def test_msvd_from_the_pickle(write: Write, put: Write) -> None:
    for protocol in (0, 2, 4):
        clips = by_id(msvd(write, put, write("raw-captions.pkl", pickle.dumps(WORDS, protocol))))
        assert clips["a_1_2"].captions == ("a man", "a man", "café")  # a repeated caption is a caption
        assert {c.split for c in clips.values()} == {"train", "val", "test"}
    # As Python 2 wrote it: byte strings, here in latin-1.
    python2 = b"(dp0\nS'a_1_2'\np1\n(lp2\n(lp3\nS'caf\\xe9'\np4\naas."
    assert by_id(msvd(write, put, write("py2.pkl", python2)))["a_1_2"].captions == ("café",)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch evil",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pkl", pickle.dumps({"a_1_2": Evil()}), r"was not unpickled \(it names posix.system, .*: save it as JSON"),
        ("a.pkl", pickle.dumps({"a_1_2": Counter()}), r"it names collections.Counter"),
        ("a.pkl", pickle.dumps(WORDS)[:50], "was not unpickled"),
        ("a.pkl", b"", "was not unpickled"),
        ("a.pkl", pickle.dumps([1]), "is not MSVD's captions: expected"),
        ("a.json", {"a_1_2": "one"}, "is not MSVD's captions"),
        ("a.json", {"a_1_2": [1]}, "is not MSVD's captions"),
        ("a.json", {}, "hold no video with a caption"),
    ],
)
def test_msvd_mistakes(
    name: str, content: Any, message: str, write: Write, put: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        read(msvd(write, put, write(name, content)))
    assert not Path("evil").exists()


def test_lists_and_captions_that_differ(write: Write, put: Write, caplog: pytest.LogCaptureFixture) -> None:
    config = msvd(write, put, write("a.json", {"a_1_2": ["x", " "], "c_1_2": ["x"], "d_1_2": [" "]}))
    config = config.model_copy(update={"train_ids": write("twice.txt", "a_1_2\nb_3_4\na_1_2\n")})
    assert {i: c.captions for i, c in by_id(config).items()} == {"a_1_2": ("x",), "c_1_2": ("x",)}
    assert "1 ids are listed twice: taken once" in caplog.text
    assert "1 ids have no caption (b_3_4): left out" in caplog.text
    assert "2 videos have no caption (b_3_4, d_1_2): left out" in caplog.text


# LSMDC

CLIP = "1012_Unbreakable_00.05.{:02}.065-00.05.21.941"


def lsmdc_line(second: int, sentence: str = 'SOMEONE says "no.') -> str:
    return f"{CLIP.format(second)}\t00:05:16:065\t00:05:21:941\t00:05:16:065\t00:05:21:941\t{sentence}\n"


def test_lsmdc(write: Write, put: Write, caplog: pytest.LogCaptureFixture) -> None:
    config = LsmdcConfig(
        train=write("LSMDC16_annos_training.csv", lsmdc_line(10) + lsmdc_line(16) + '"' + lsmdc_line(11, "b") + "\r\n"),
        val=write("val.csv", lsmdc_line(12) + lsmdc_line(12, "caf\u00e9").replace("\n", "\r\n")),
        test=write("test.csv", lsmdc_line(13, "a\u2028b").rstrip("\n")),
        videos=put(*(f"1012_Unbreakable/{CLIP.format(s)}.avi" for s in (10, 11, 12))),
    )
    clips = by_id(config)
    assert list(clips) == [CLIP.format(s) for s in (10, 11, 12, 13)]
    assert CLIP.format(16) == lsmdc.SKIPPED
    assert "is left out, as everywhere" in caplog.text
    assert clips[CLIP.format(10)].captions == ('SOMEONE says "no.',)
    assert clips[CLIP.format(12)].captions == ('SOMEONE says "no.', "café")
    assert clips[CLIP.format(13)].captions == ("a b",)
    assert {c.source_id for c in clips.values()} == {"1012_Unbreakable"}
    assert clips[CLIP.format(10)].video == f"1012_Unbreakable/{CLIP.format(10)}.avi"
    assert clips[CLIP.format(13)].size is None


def test_lsmdc_carves_whole_movies(write: Write, put: Write) -> None:
    rows = [lsmdc_line(i % 60).replace("1012", str(i // 60)) for i in range(1200)]
    config = LsmdcConfig(
        train=write("a.csv", "".join(rows)), test=write("b.csv", lsmdc_line(1)), videos=put("a"), carve_val=0.3
    )
    with pytest.raises(DataError, match=r"none of the 1,2.* annotated videos has a file"):
        read(config)
    clips = read(config.model_copy(update={"videos": put(f"{CLIP.format(1)}.avi")}))
    assert all((c.split == "val") == in_val(c.source_id, 0.3) for c in clips if c.split != "test")
    assert 0 < counts(clips)["val"] < 700
    assert counts(clips)["val"] % 60 == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no clip"),
        ("clip,sentence\n", "line 1: 1 values separated by tabs, not the 6 of LSMDC"),
        (lsmdc_line(2) + "a\t1\t2\t3\t4\n", "line 2: 5 values separated by tabs"),
        (lsmdc_line(1), "is in train and in test"),
    ],
)
def test_lsmdc_mistakes(text: str, message: str, write: Write, put: Write) -> None:
    config = LsmdcConfig(
        train=write("a.csv", text), test=write("b.csv", lsmdc_line(1)), videos=put(f"{CLIP.format(1)}.avi"), carve_val=0
    )
    with pytest.raises(DataError, match=message):
        read(config)


# DiDeMo


def test_didemo_tables(shared: Path, put: Write) -> None:
    paths = {s: str(shared / "annotations" / "Didemo" / f"didemo_{s}_label.csv") for s in ("train", "val", "test")}
    first = "54322086@N00_2408598493_274c77d26a"
    clips = read(DidemoConfig(**paths, videos=put(f"{first}.avi.mp4", "26292851@N04_4253489686_265c3c8051.mp4")))
    assert counts(clips) == {"train": 8362, "val": 1062, "test": 1004}
    assert {len(c.captions) for c in clips} == {1}
    assert not any("\n" in c.captions[0] or "  " in c.captions[0] for c in clips)
    named = {c.video_id: c for c in clips}
    assert named[first][4:] == (f"{first}.avi.mp4", None, 30.0, 100)
    assert named[first].captions[0].startswith("a brown rat goes into someone's hand then onto a cage. a brown rat")
    assert named["26292851@N04_4253489686_265c3c8051"].video.endswith(".mp4")
    assert not any("/" in c.video for c in clips)  # the paths of another machine


def test_didemo_json_and_table_are_one(write: Write, put: Write) -> None:
    def moment(video: str, text: str, n: int) -> dict[str, Any]:
        return {"annotation_id": n, "description": text, "video": video, "times": [[0, 0], [1, 2]], "num_segments": 6}

    moments = [moment("a@N0_1.mov", " One\n thing.", 1), moment("b@N0_2.", "x", 2), moment("a@N0_1.mov", "another", 3)]
    rows = 'success,video_path,text\r\nTrue,/home/me/a@N0_1.mov,"One thing. another"\r\nTrue,C:\\v\\b@N0_2.,x\r\n'
    others = {"val": write("v.json", [moment("c.null", "c", 4)]), "test": write("t.json", [moment("d.3gp", "d", 5)])}
    videos = put("sub/a@N0_1.mp4", "b@N0_2.mp4", "c.mp4", "d.3gp.mp4")
    official = DidemoConfig(train=write("train_data.json", moments), videos=videos, **others)
    clips = by_id(official)
    assert clips["a@N0_1"].captions == ("One thing. another",)
    assert [c.video for c in clips.values()] == ["sub/a@N0_1.mp4", "b@N0_2.mp4", "c.mp4", "d.3gp.mp4"]
    assert by_id(official.model_copy(update={"train": write("train.csv", rows)})) == clips
    assert {c.end for c in read(official.model_copy(update={"seconds": None}))} == {None}
    for name, content, message in (
        ("x.json", [{"video": "a"}], "is not DiDeMo's JSON: expected"),
        ("x.json", {"a": 1}, "is not DiDeMo's JSON"),
        ("x.csv", "video,caption\n", "has no column 'video_path'"),
        ("x.csv", "", "has no column 'video_path', only none"),
        ("x.json", [moment("d.avi", "same video as in test", 1)], "'d' is in train and in test"),
    ):
        with pytest.raises(DataError, match=message):
            read(official.model_copy(update={"train": write(name, content)}))


# ActivityNet Captions


def test_activitynet(shared: Path, write: Write, put: Write, caplog: pytest.LogCaptureFixture) -> None:
    folder = shared / "annotations" / "ActivityNet"
    train = {f"v_{i}": {"duration": 9.0, "timestamps": [[0, 9]], "sentences": ["A.", " B. "]} for i in range(2000)}
    config = ActivityNetConfig(
        train=write("train.json", train),
        test=str(folder / "val_1.json"),
        videos=put("uqiMw7tQ1Cc.mkv", "v_0.mp4"),
    )
    clips = read(config)
    assert counts(clips)["test"] == 4917
    assert counts(clips)["train"] + counts(clips)["val"] == 2000
    assert all((c.split == "val") == in_val(c.source_id) for c in clips if c.split != "test")
    named = {c.video_id: c for c in clips}
    assert named["v_0"].captions == ("A. B.",)
    assert (named["v_0"].video, named["v_uqiMw7tQ1Cc"].video) == ("v_0.mp4", "uqiMw7tQ1Cc.mkv")
    assert named["v_uqiMw7tQ1Cc"].captions == (
        "A weight lifting tutorial is given. The coach helps the guy in red with the proper body placement and lifting "
        "technique.",
    )
    good = read(config.model_copy(update={"bad_videos": str(folder / "bad_vids.txt")}))
    assert counts(good)["test"] == 4916
    assert {c.video_id for c in clips} - {c.video_id for c in good} == {"v_LURZ8QDfowU"}
    assert "1 bad videos are left out (v_LURZ8QDfowU)" in caplog.text
    listed = read(config.model_copy(update={"test_ids": str(folder / "val_ids.json")}))
    assert counts(listed)["test"] == 4916
    assert "differ in 10 ids" in caplog.text
    # val_1.json is the only real file here; the form of train.json is the same.
    as_train = config.model_copy(update={"train": config.test, "test": config.train})
    assert counts(read(as_train))["train"] + counts(read(as_train))["val"] == 4917
    with pytest.raises(DataError, match="is not ActivityNet Captions: expected"):
        read(config.model_copy(update={"train": write("x.json", {"v_0": {"duration": 1}})}))
    with pytest.raises(DataError, match="is no list of video ids"):
        read(config.model_copy(update={"train_ids": write("x.json", {"v_0": 1})}))


# VATEX


def vatex_json(*ids: str) -> list[dict[str, Any]]:
    return [{"videoID": i, "enCap": [f"{k} of {i}" for k in range(10)], "chCap": ["一"] * 10} for i in ids]


def test_vatex(write: Write, put: Write, caplog: pytest.LogCaptureFixture) -> None:
    both = write(
        "vatex_validation_v1.0.json", vatex_json("b_c-_000001_000011", "b_c-_000020_000030", "e_000000_000010")
    )
    config = VatexConfig(
        train=write("train.json", vatex_json("a_000010_000020")),
        val=both,
        test=both,
        val_ids=write("val.txt", "b_c-_000001_000011\nb_c-_000020_000030\ngone_000000_000010\n"),
        test_ids=write("test.txt", "e_000000_000010\n"),
        videos=put("cut/a_000010_000020.mp4", "b_c-.webm"),
    )
    clips = by_id(config)
    assert counts(list(clips.values())) == {"train": 1, "val": 2, "test": 1}
    assert {len(c.captions) for c in clips.values()} == {10}
    assert clips["a_000010_000020"].source_id == "a"
    assert clips["a_000010_000020"][4:] == ("cut/a_000010_000020.mp4", None, None, 100)
    # Two spans of one long video share its bytes.
    assert clips["b_c-_000001_000011"][4:] == ("b_c-.webm", 1.0, 11.0, 50)
    assert clips["b_c-_000020_000030"][2:] == (
        "b_c-",
        tuple(f"{k} of b_c-_000020_000030" for k in range(10)),
        *("b_c-.webm", 20.0, 30.0, 50),
    )
    assert clips["e_000000_000010"].size is None
    assert "1 ids are not in" in caplog.text
    for content, message in (
        ([{"videoID": "a_000010_000020", "chCap": []}], "has no 'enCap': give the public test set with captions"),
        ([{"id": 1}], "has no 'videoID': expected"),
        ({"a": 1}, "is not VATEX's JSON"),
        (vatex_json("a_10_20"), "the id 'a_10_20' does not end in _START_END"),
        (vatex_json("a_000010_000020", "a_000010_000020"), "is annotated twice in train: remove one"),
        (vatex_json("e_000000_000010"), "is in train and in test"),
    ):
        with pytest.raises(DataError, match=message):
            read(config.model_copy(update={"train": write("x.json", content)}))


# Tables: WebVid, Panda-70M and others

WEBVID = "videoid,contentUrl,duration,page_dir,name\n"


def table(preset: str, *overrides: str) -> TableConfig:
    config = configs.load(BuildConfig, preset, ["output=o", *(f"source.{o}" for o in overrides)], PRESETS).source
    assert isinstance(config, TableConfig)
    return config


def test_webvid(write: Write, put: Write, caplog: pytest.LogCaptureFixture) -> None:
    rows = [f'{i},https://host/{i}/preview.mp4,PT00H00M10S,0000_0001,"Man, {i}  walks"\n' for i in range(1000)]
    train = write("train.csv", WEBVID + "".join(rows) + "1000,https://h,P,d,\n7,https://h,P,d,again\n")
    val = write("val.csv", WEBVID + "5,https://host/5,P,d,also in val\n")
    videos = put("0000_0001/7.mp4", "0000_0001/8.mp4", "5.webm")
    clips = read(table("webvid", f"train={train}", f"val={val}", f"videos={videos}"))
    assert counts(clips) == {"train": 999, "val": 1}
    named = {c.video_id: c for c in clips}
    assert named["7"] == Clip("train", "7", "7", ("Man, 7 walks",), "0000_0001/7.mp4", None, None, 50)
    assert named["5"].split == "val"  # as what is selected on must not be trained on
    assert named["9"][4:] == ("https://host/9/preview.mp4", None, None, None)  # only named, for the report
    assert "997 of 1002 videos have no file below" in caplog.text
    assert caplog.text.count("1 rows have no caption: left out") == 1  # of two readings
    assert "2 clips repeat the id of another: left out" in caplog.text
    carved = read(table("webvid", f"train={train}", f"test={val}", f"videos={videos}"))
    assert 20 < counts(carved)["val"] < 90
    assert all((c.split == "val") == in_val(c.source_id) for c in carved if c.split != "test")
    assert counts(carved)["test"] == 1
    most = read(table("webvid", f"train={train}", f"test={val}", f"videos={videos}", "carve_val=0.999"))
    assert counts(most)["test"] == 1  # only train is carved
    with pytest.raises(DataError, match=r"none of the .* has a file below .* or download the videos first"):
        read(table("webvid", f"train={train}", f"videos={put('../other/x.mp4') + '/../other'}"))


PANDA = "videoID,url,timestamp,caption,matching_score,desirable_filtering,shot_boundary_detection\n"


def panda_row(video_id: str, spans: list[Any], sentences: list[Any]) -> str:
    """A row as Panda-70M's authors wrote it: lists as Python prints them."""
    text = io.StringIO()
    scores = [0.5] * len(spans)
    values = [video_id, f"https://www.youtube.com/watch?v={video_id}", spans, sentences, scores, scores, scores]
    csv.writer(text).writerow(map(str, values))
    return text.getvalue()


def test_panda70m(write: Write, put: Write) -> None:
    spans = [["0:00:30.113", "0:00:38.538"], ["0:01:02.000", "1:00:00"]]
    long = [[f"0:00:{i % 50}", "1:00:00"] for i in range(50)]
    files = {
        "train": write(
            "train.csv",
            PANDA + panda_row("-aZ", spans, ['It\'s a "dog".', "A cat."]) + panda_row("long", long, ["x" * 5000] * 50),
        ),
        "val": write("val.csv", PANDA + panda_row("v", spans[:1], ["v"])),
        "test": write("test.csv", PANDA + panda_row("t", spans, ["t", None])),
    }
    clips = by_id(table("panda70m", *(f"{k}={v}" for k, v in files.items()), f"videos={put('x/-aZ.mp4', 'long.mkv')}"))
    assert counts(list(clips.values())) == {"test": 1, "val": 1, "train": 52}
    first, second = clips["-aZ:30.113-38.538"], clips["-aZ:62-3600"]
    assert first == Clip("train", first.video_id, "-aZ", ('It\'s a "dog".',), "x/-aZ.mp4", 30.113, 38.538, 50)
    assert (second.captions, second.source_id) == (("A cat.",), "-aZ")
    assert clips["long:7-3600"].size == 2  # 100 bytes among 50 clips, in a row longer than csv's own limit
    assert clips["t:30.113-38.538"][4:] == ("https://www.youtube.com/watch?v=t", 30.113, 38.538, None)


COLUMNS = '{"id": "id", "path": "file", "url": null, "start": "start", "end": "end", "caption": "text"}'


def test_a_parquet_table_is_the_csv_table(write: Write, put: Write, tmp_path: Path) -> None:
    rows = [
        {"id": i, "file": f"d/{i // 3}.mp4", "start": 2.5 * i, "end": 2.5 * i + 2, "text": f"c {i}"} for i in range(30)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet", row_group_size=7)
    lines = ["\t".join(map(str, row.values())) for row in rows]
    tabs = write("t.csv", "\n".join(["\t".join(rows[0]), *lines]))
    videos = put(*(f"d/{i}.mp4" for i in range(9)))
    clips = read(table("webvid", f"train={tmp_path / 't.parquet'}", f"videos={videos}", f"columns={COLUMNS}"))
    assert clips == read(table("webvid", f"train={tabs}", f"videos={videos}", f"columns={COLUMNS}"))
    assert clips[4]._replace(split="") == Clip("", "4:10-12", "d/1.mp4", ("c 4",), "d/1.mp4", 10.0, 12.0, 33)
    assert {c.size for c in clips[-3:]} == {None}
    lists = [{"videoID": "a", "url": "u", "timestamp": [["0:01", "0:02"], ["0:02", "0:03"]], "caption": ["x", "y"]}]
    pq.write_table(pa.Table.from_pylist(lists), tmp_path / "l.parquet")
    nested = read(table("panda70m", f"train={tmp_path / 'l.parquet'}", f"videos={put('a.mp4')}"))
    assert [c.video_id for c in nested] == ["a:1-2", "a:2-3"]


def test_a_table_on_s3_and_one_that_is_not_utf_8(s3: str, put: Write, caplog: pytest.LogCaptureFixture) -> None:
    storage.publish_bytes(f"\ufeff{WEBVID}".encode() + b'1,u,P,d,"caf\xe9\n \xc3\xa9"\r\n', f"{s3}/t.csv")
    [clip] = read(table("webvid", f"train={s3}/t.csv", f"videos={put('1.mp4')}"))
    assert clip.captions == ("café é",)
    assert f"{s3}/t.csv, line 2 is not UTF-8: read such bytes as cp1252" in caplog.text


def test_odd_bytes_are_cp1252_with_a_word_in_the_log(write: Write, put: Write, caplog: Any) -> None:
    odd = write("a.json", b'{"a_1_2": ["it\x92s caf\xe9", "caf\xc3\xa9", "\x81"]}')
    clips = by_id(msvd(write, put, odd))
    assert clips["a_1_2"].captions == ("it\u2019s café", "café", "\ufffd")
    assert "a.json is not UTF-8 at byte 14: read such bytes as cp1252" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("\n", "holds no row with a caption"),
        ("1,u,[],x\n", r"train.csv, line 2: column 'caption' holds 'x', not a list"),
        ("1,u,soon,['x']\n", r"line 2: column 'timestamp' holds 'soon', not a list"),
        (",u,[],[]\n", "line 2: no id in column 'videoID'"),
        ("1,u,\"[['0:01', '0:02']]\",[]\n", "line 2: 0 captions for 1 spans"),
        ("1,u,[['0:01']],['x']\n", r"line 2: .* is not a pair \[start, end\]"),
        ("1,u,\"[['0:02', '0:01']]\",['x']\n", "line 2: end 1 is not after start 2"),
        ("1,u,\"[['0:01', 'late']]\",['x']\n", "line 2: 'late' is no time"),
        ("1,u,\"[['0:01', '-1']]\",['x']\n", "line 2: '-1' is no time"),
        ("1,u,[]\n", "line 2: 3 values for 4 columns"),
        ("1,u," + "[" * 5000 + ",x\n", "not a list"),
    ],
)
def test_table_mistakes(row: str, message: str, write: Write, put: Write) -> None:
    train = write("train.csv", "videoID,url,timestamp,caption\n" + row)
    with pytest.raises(DataError, match=message):
        read(table("panda70m", f"train={train}", f"videos={put('1.mp4')}"))


def test_tables_of_another_form(write: Write, put: Write) -> None:
    videos = f"videos={put('1.mp4')}"
    with pytest.raises(
        DataError, match=r"no column 'name', only videoid: give source.columns.\* their names, and null"
    ):
        read(table("webvid", f"train={write('a.csv', 'videoid')}", videos))
    with pytest.raises(DataError, match=r"a.parquet is not a parquet file"):
        read(table("webvid", f"train={write('a.parquet', b'PAR1')}", videos))
    with pytest.raises(NotFoundError, match="does not exist"):
        read(table("webvid", "train=/nowhere.csv", videos))
    with pytest.raises(StorageError, match="unknown scheme; use a local path or s3"):
        read(table("webvid", "train=https://host/a.csv", videos))
    with pytest.raises(ConfigError, match="holds the times: leave out start and end"):
        table("panda70m", "train=a", videos, "columns.start=b")


def test_a_table_is_read_in_a_stream(write: Write, put: Write) -> None:
    train = write("train.csv", WEBVID + "".join(f"{i},u,P,d,c\n" for i in range(3)))
    clips = SOURCES["table"](table("webvid", f"train={train}", f"videos={put('1.mp4')}"))
    assert isinstance(clips, Iterator)
    assert next(clips).video_id == "0"


# All


def test_missing_files_are_told(write: Write, put: Write) -> None:
    with pytest.raises(NotFoundError, match=r"none\.json does not exist"):
        read(msvd(write, put, "none.json"))
    with pytest.raises(StorageError, match="unknown scheme"):
        read(msvd(write, put, "http://host/captions.json"))
    config = msvd(write, put, write("a.json", {"a_1_2": ["x"]}))
    with pytest.raises(DataError, match=r"source.videos=.* is no folder with videos in it"):
        read(config.model_copy(update={"videos": "/nowhere"}))


def test_every_source_has_a_configuration_and_a_preset() -> None:
    [union, *_] = get_args(SourceConfig)
    names = {section.model_fields["name"].default for section in get_args(union)}
    assert names == set(SOURCES)
    used = {command(preset)[0] for preset in configs.preset_names(PRESETS)}
    assert used == set(configs.preset_names(PRESETS))


def command(preset: str) -> list[str]:
    """The preset's name and overrides in the command that its header tells."""
    header = "".join(re.findall(r"^# ?(.*\n)", (PRESETS / f"{preset}.yaml").read_text(), re.MULTILINE))
    [line] = re.findall(r"python -m datasets_prep.build (.*)", header.replace("\\\n", ""))
    return line.split()


@pytest.mark.parametrize("preset", configs.preset_names(PRESETS))
def test_a_preset_loads_by_the_command_in_its_header(preset: str) -> None:
    name, *overrides = command(preset)
    config = configs.load(BuildConfig, name, overrides, PRESETS)
    assert config.source.name in SOURCES
    text = (PRESETS / f"{preset}.yaml").read_text()
    assert all(len(line) <= 120 for line in text.splitlines())
    docs = (PRESETS.parents[1] / "docs" / "datasets.md").read_text().replace("\\\n", "")
    if preset not in ("custom", "moving_shapes", "tiny"):
        told = re.findall(rf"^python -m datasets_prep.build {preset} (.*)$", docs, re.MULTILINE)
        assert [c.split()[:-1] for c in told] == [overrides[:-1]]  # the docs tell the same command
