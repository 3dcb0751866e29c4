"""The configuration of each benchmark: which annotation files it needs. Light, as `config.py` is.

A key that several benchmarks share means the same in each: `--help` lists it once. docs/datasets.md has a section on
every one of them.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from common.config import Settings

VIDEOS = "folder or s3:// prefix with the video files, flat or nested, as they were downloaded"
TRAIN, VAL, TEST = (f"annotation file of the {split} split" for split in ("train", "val", "test"))
IDS = "list of the {} split's video ids (.txt, .csv or .json)"
CARVE = "share of train's sources that become val, by their hash, where the benchmark has no val split"
Share = Annotated[float, Field(ge=0, lt=1)]


class MsrvttConfig(Settings):
    """MSR-VTT: 10,000 clips with 20 captions each."""

    name: Literal["msrvtt"] = Field("msrvtt", description="source")
    protocol: Literal["9k", "7k", "full"] = Field(
        description="MSR-VTT's split: train on 9,000 or 7,010 and test on 1k-A, or the official full one"
    )
    captions: str = Field(description="MSRVTT_data.json, or train_val_videodatainfo.json")
    test_captions: str | None = Field(
        None, description="test_videodatainfo.json, where source.captions is train_val_videodatainfo.json"
    )
    train_ids: str | None = Field(None, description=IDS.format("train"))
    test_pairs: str | None = Field(None, description="MSRVTT_JSFUSION_test.csv: columns video_id and sentence")
    videos: str = Field(description=VIDEOS)
    carve_val: Share = Field(0.05, description=CARVE)

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [key for key in ("train_ids", "test_pairs") if getattr(self, key) is not None]
        if self.protocol == "full" and given:
            raise ValueError(f"source.protocol=full takes its splits from source.captions: leave out source.{given[0]}")
        if self.protocol != "full" and len(given) < 2:
            example = f"MSRVTT_train.{self.protocol}.csv and MSRVTT_JSFUSION_test.csv"
            raise ValueError(f"source.protocol={self.protocol} needs source.train_ids and source.test_pairs: {example}")
        return self


class MsvdConfig(Settings):
    """MSVD: 1,970 clips with about 41 captions each."""

    name: Literal["msvd"] = Field("msvd", description="source")
    captions: str = Field(description="captions_msvd.json or raw-captions.pkl")
    train_ids: str = Field(description=IDS.format("train"))
    val_ids: str = Field(description=IDS.format("val"))
    test_ids: str = Field(description=IDS.format("test"))
    videos: str = Field(description=VIDEOS)


class LsmdcConfig(Settings):
    """LSMDC: clips of movies, one sentence each."""

    name: Literal["lsmdc"] = Field("lsmdc", description="source")
    train: str = Field(description=TRAIN)
    val: str | None = Field(None, description=VAL)
    test: str = Field(description=TEST)
    videos: str = Field(description=VIDEOS)
    carve_val: Share = Field(0.05, description=CARVE)


class DidemoConfig(Settings):
    """DiDeMo: one paragraph per video, made of the descriptions of its moments."""

    name: Literal["didemo"] = Field("didemo", description="source")
    train: str = Field(description=TRAIN)
    val: str = Field(description=VAL)
    test: str = Field(description=TEST)
    videos: str = Field(description=VIDEOS)
    seconds: PositiveFloat | None = Field(
        30.0, description="DiDeMo: how much of a video is used, as only that was described; null = all of it"
    )


class ActivityNetConfig(Settings):
    """ActivityNet Captions as paragraph retrieval: a video's sentences are one caption."""

    name: Literal["activitynet"] = Field("activitynet", description="source")
    train: str = Field(description=TRAIN)
    test: str = Field(description=TEST)
    train_ids: str | None = Field(None, description=IDS.format("train"))
    test_ids: str | None = Field(None, description=IDS.format("test"))
    bad_videos: str | None = Field(None, description="list of video ids to leave out: bad_vids.txt")
    videos: str = Field(description=VIDEOS)
    carve_val: Share = Field(0.05, description=CARVE)


class VatexConfig(Settings):
    """VATEX: clips of 10 seconds with 10 English captions each."""

    name: Literal["vatex"] = Field("vatex", description="source")
    train: str = Field(description=TRAIN)
    val: str = Field(description=VAL)
    test: str = Field(description=TEST)
    train_ids: str | None = Field(None, description=IDS.format("train"))
    val_ids: str | None = Field(None, description=IDS.format("val"))
    test_ids: str | None = Field(None, description=IDS.format("test"))
    videos: str = Field(description=VIDEOS)


class TableColumns(Settings):
    """What a table's columns are called; a name given here must be in the table. The defaults are WebVid's."""

    id: str = Field("videoid", description="column with the id of the video: a file of that name is looked for")
    caption: str = Field("name", description="column with the caption, or a list of them")
    path: str | None = Field(None, description="column with the file, relative to source.videos, before the id's")
    url: str | None = Field("contentUrl", description="column with the address: it is named, never fetched")
    start: str | None = Field(None, description="column with the clip's start, in seconds or as H:MM:SS.mmm")
    end: str | None = Field(None, description="column with the clip's end, in seconds or as H:MM:SS.mmm")
    spans: str | None = Field(
        None, description="column with a list of [start, end], one for each of a list of captions"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.spans is not None and (self.start or self.end) is not None:
            raise ValueError(f"source.columns.spans={self.spans} holds the times: leave out start and end")
        return self


class TableConfig(Settings):
    """A table of any length in CSV or parquet, as WebVid and Panda-70M have it."""

    name: Literal["table"] = Field("table", description="source")
    train: str = Field(description=TRAIN)
    val: str | None = Field(None, description=VAL)
    test: str | None = Field(None, description=TEST)
    videos: str = Field(description=VIDEOS)
    columns: TableColumns = TableColumns()
    carve_val: Share = Field(0.05, description=CARVE)
