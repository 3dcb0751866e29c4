from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from common.errors import DataError, NotFoundError
from datasets_prep.config import CustomConfig
from datasets_prep.plan import Clip
from datasets_prep.sources import custom

Annotate = Callable[..., str]


def read(annotations: str, videos: Path, **fractions: float) -> dict[str, Clip]:
    config = CustomConfig(annotations=annotations, videos=str(videos), **fractions)  # type: ignore[arg-type]
    clips = custom.read(config)
    assert len({c.video_id for c in clips}) == len(clips)
    return {c.video_id: c for c in clips}


def test_lines_of_a_video_merge_and_spans_are_clips(annotate: Annotate, videos: Path) -> None:
    path = annotate(
        {"video": "small.mp4", "captions": ["one", "two"], "split": "train"},
        {"video": "./small.mp4", "caption": "three"},
        {"video": "small.mp4", "caption": " two\n"},
        {"video": "wide.mp4", "caption": "a", "start": 0, "end": 1.5, "group": "g"},
        {"video": "wide.mp4", "caption": "b", "start": 1.5},
    )
    clips = read(path, videos)
    assert set(clips) == {"small.mp4", "wide.mp4:0-1.5", "wide.mp4:1.5-"}
    assert clips["small.mp4"].captions == ("one", "two", "three")  # once each, cleaned
    assert (clips["small.mp4"].split, clips["small.mp4"].source_id) == ("train", "small.mp4")
    assert clips["wide.mp4:0-1.5"].source_id == "g"
    assert clips["wide.mp4:1.5-"].source_id == "wide.mp4"
    assert (clips["wide.mp4:1.5-"].start, clips["wide.mp4:1.5-"].end) == (1.5, None)
    assert clips["wide.mp4:0-1.5"].size == (videos / "wide.mp4").stat().st_size // 2


def test_csv_gives_the_same_clips(annotate: Annotate, videos: Path, tmp_path: Path) -> None:
    table = tmp_path / "annotations.csv"
    table.write_text(
        "video,caption,split,group,start,end\n"
        'small.mp4,"one, and more",train,g,,\n'
        "small.mp4,two,,,,\n"
        "wide.mp4,a,test,,0.5,1\n"
    )
    lines = annotate(
        {"video": "small.mp4", "captions": ["one, and more", "two"], "split": "train", "group": "g"},
        {"video": "wide.mp4", "caption": "a", "split": "test", "start": 0.5, "end": 1},
    )
    assert read(str(table), videos) == read(lines, videos)


def test_splits_are_dealt_by_group(annotate: Annotate, videos: Path) -> None:
    lines = [{"video": f"{i}.mp4", "caption": "x", "group": f"g{i // 4}"} for i in range(4000)]
    clips = read(annotate(*lines), videos, val_fraction=0.2, test_fraction=0.3)
    by_group: dict[str, set[str]] = {}
    for clip in clips.values():
        by_group.setdefault(clip.source_id, set()).add(clip.split)
    assert all(len(splits) == 1 for splits in by_group.values())
    counts = Counter(c.split for c in clips.values())
    assert 0.15 < counts["val"] / 4000 < 0.25
    assert 0.25 < counts["test"] / 4000 < 0.35
    fewer = read(annotate(*lines[::7]), videos, val_fraction=0.2, test_fraction=0.3)
    assert all(clips[name].split == clip.split for name, clip in fewer.items())  # others do not matter


def test_a_missing_video_is_a_clip_without_size(annotate: Annotate, videos: Path) -> None:
    path = annotate({"video": "nowhere.mp4", "caption": "x"}, {"video": "../secret.mp4", "caption": "x"})
    assert [c.size for c in read(path, videos).values()] == [None, None]


def test_a_video_is_the_file_named_and_no_other(annotate: Annotate, tmp_path: Path) -> None:
    (tmp_path / "videos" / "cat").mkdir(parents=True)
    (tmp_path / "videos" / "cat" / "1.mp4").write_bytes(b"xyz")
    lines = [{"video": name, "caption": "x"} for name in ("cat/1.mp4", "1.mp4", "dog/1.mp4", "cat/1.avi", "cat/1")]
    assert [c.size for c in read(annotate(*lines), tmp_path / "videos").values()] == [3, None, None, None, None]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"video": "a.mp4", "caption":', "line 2: not valid JSON"),
        ("[1]", "line 2: expected an object"),
        ({"caption": "x"}, "line 2: no 'video'"),
        ({"video": "a.mp4"}, "line 2: no 'caption' or 'captions'"),
        ({"video": "a.mp4", "captions": []}, "line 2: no 'caption' or 'captions'"),
        ({"video": "a.mp4", "captions": "x"}, "line 2: 'captions' is 'x', not a list"),
        ({"video": "a.mp4", "caption": " "}, "line 2: no 'caption' or 'captions'"),
        ({"video": "a.mp4", "caption": "x", "split": "a/b"}, "line 2: split 'a/b' names a folder"),
        ({"video": "a.mp4", "caption": "x", "group": 3}, "line 2: 'group' is 3, not a text"),
        ({"video": "a.mp4", "caption": "x", "start": "soon"}, "line 2: 'start' is 'soon', not a number"),
        ({"video": "a.mp4", "caption": "x", "start": 2, "end": 2}, "line 2: end 2 is not after start 2"),
        ({"video": "good.mp4", "caption": "x", "split": "test"}, "line 2: split 'test' contradicts"),
    ],
)
def test_bad_lines_are_told_by_number(annotate: Annotate, videos: Path, line: dict | str, message: str) -> None:
    path = annotate({"video": "good.mp4", "caption": "x", "split": "train"}, line)
    with pytest.raises(DataError, match=message):
        read(path, videos)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no annotations"),
        ("video,caption\n", "holds no annotations"),
        ("file,caption\na.mp4,x\n", "line 1: no column video"),
        ("video,caption\na.mp4,one, two\n", "line 2: more values than columns"),
        ("video,caption\na.mp4\n", "line 2: no 'caption'"),
    ],
)
def test_bad_tables(videos: Path, tmp_path: Path, text: str, message: str) -> None:
    table = tmp_path / "a.csv"
    table.write_text(text)
    with pytest.raises(DataError, match=message):
        read(str(table), videos)


def test_bad_files(annotate: Annotate, videos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no annotations"):
        read(annotate("", " "), videos)
    with pytest.raises(NotFoundError, match="does not exist"):
        read(str(tmp_path / "none.jsonl"), videos)
    (tmp_path / "binary.jsonl").write_bytes("\ufeff{}".encode("utf-16"))
    with pytest.raises(DataError, match="not UTF-8"):
        read(str(tmp_path / "binary.jsonl"), videos)
    with pytest.raises(DataError, match="no folder with videos"):
        read(annotate({"video": "a.mp4", "caption": "x"}), tmp_path / "none")


def test_a_table_as_spreadsheets_save_it(videos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.csv").write_bytes("video,caption\r\nsmall.mp4,\u201ccaf\u00e9\u201d\r\n".encode("cp1252"))
    assert read(str(tmp_path / "a.csv"), videos)["small.mp4"].captions == ("\u201ccaf\u00e9\u201d",)
    assert "a.csv is not UTF-8 at byte 25: read such bytes as cp1252" in caplog.text


def test_unused_names_are_mentioned(annotate: Annotate, videos: Path, caplog: pytest.LogCaptureFixture) -> None:
    read(annotate({"video": "a.mp4", "caption": "x", "gruop": "g"}), videos)
    assert "gruop not used" in caplog.text
