"""Tables: WebVid, Panda-70M and others, on small files of their exact form."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common import config as configs
from common import storage
from common.errors import ConfigError, DataError, NotFoundError, StorageError
from datasets_prep.benchmarks import TableConfig
from datasets_prep.config import PRESETS, BuildConfig
from datasets_prep.plan import Clip
from datasets_prep.sources import SOURCES
from tests.datasets_prep.builds import Write, by_id, counts, in_val, read

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
    assert counts(clips) == {"train": 1000, "val": 1}
    named = {c.video_id: c for c in clips}
    assert named["7"] == Clip("train", "7", "7", ("Man, 7 walks",), "0000_0001/7.mp4", None, None, 50)
    assert named["5"].split == "val"  # as what is selected on must not be trained on
    assert named["9"][4:] == ("https://host/9/preview.mp4", None, None, None)  # only named, for the report
    assert named["1000"].captions == ()  # it will be rejected
    assert "2 clips repeat the id of another: left out" in caplog.text
    carved = read(table("webvid", f"train={train}", f"test={val}", f"videos={videos}"))
    assert 20 < counts(carved)["val"] < 90
    assert all((c.split == "val") == in_val(c.source_id) for c in carved if c.split != "test")
    assert counts(carved)["test"] == 1
    most = read(table("webvid", f"train={train}", f"test={val}", f"videos={videos}", "carve_val=0.999"))
    assert counts(most)["test"] == 1  # only train is carved


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
    assert counts(list(clips.values())) == {"test": 2, "val": 1, "train": 52}
    first, second = clips["-aZ:30.113-38.538"], clips["-aZ:62-3600"]
    assert first == Clip("train", first.video_id, "-aZ", ('It\'s a "dog".',), "x/-aZ.mp4", 30.113, 38.538, 50)
    assert (second.captions, second.source_id) == (("A cat.",), "-aZ")
    assert clips["long:7-3600"].size == 2  # 100 bytes among 50 clips, in a row longer than csv's own limit
    assert clips["t:30.113-38.538"][4:] == ("https://www.youtube.com/watch?v=t", 30.113, 38.538, None)
    assert clips["t:62-3600"].captions == ()


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
