"""Every benchmark's source but MSR-VTT's: on the real annotation files where `shared` has them, else on their form."""

import os
import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import pytest

from common import config as configs
from common.errors import DataError, NotFoundError, StorageError
from datasets_prep.benchmarks import (
    ActivityNetConfig,
    DidemoConfig,
    LsmdcConfig,
    MsvdConfig,
    VatexConfig,
)
from datasets_prep.config import PRESETS, BuildConfig, SourceConfig
from datasets_prep.sources import SOURCES, lsmdc
from tests.datasets_prep.builds import Write, by_id, captions, counts, in_val, read

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
    silent = {"b_3_4": (), "d_1_2": ()}  # to be rejected, with a reason
    assert {i: c.captions for i, c in by_id(config).items()} == {"a_1_2": ("x",), "c_1_2": ("x",), **silent}
    assert "1 ids are listed twice: taken once" in caplog.text


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


# All


def test_odd_bytes_are_cp1252_with_a_word_in_the_log(write: Write, put: Write, caplog: Any) -> None:
    odd = write("a.json", b'{"a_1_2": ["it\x92s caf\xe9", "caf\xc3\xa9", "\x81"]}')
    clips = by_id(msvd(write, put, odd))
    assert clips["a_1_2"].captions == ("it\u2019s café", "café", "\ufffd")
    assert "a.json is not UTF-8 at byte 14: read such bytes as cp1252" in caplog.text


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
