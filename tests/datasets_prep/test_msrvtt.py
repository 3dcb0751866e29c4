"""MSR-VTT's three protocols, on the real lists and on the official JSON's exact form."""

import re
from pathlib import Path
from typing import Any

import pytest

from common import config as configs
from common.errors import ConfigError, DataError
from datasets_prep.benchmarks import (
    MsrvttConfig,
)
from datasets_prep.config import PRESETS, BuildConfig
from tests.datasets_prep.builds import Write, captions, counts, in_val, read


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
