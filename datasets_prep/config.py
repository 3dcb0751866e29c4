"""The configuration of a build. Light on purpose: no ray or numpy, so that a client can check it."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from common.config import Settings
from datasets_prep.benchmarks import (
    ActivityNetConfig,
    DidemoConfig,
    LsmdcConfig,
    MsrvttConfig,
    MsvdConfig,
    TableConfig,
    VatexConfig,
)

PRESETS = Path(__file__).parent / "presets"

Fraction = Annotated[float, Field(ge=0, le=1)]


class CustomConfig(Settings):
    """Your own annotations and videos."""

    name: Literal["custom"] = Field("custom", description="source")
    annotations: str = Field(description="path or URL of a .jsonl or .csv file, one line per caption or per video")
    videos: str = Field(description="folder or s3:// prefix that the annotations' video names are relative to")
    val_fraction: Fraction = Field(0.1, description="share of the groups dealt to val, for lines without a split")
    test_fraction: Fraction = Field(0.1, description="share of the groups dealt to test, for lines without a split")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.val_fraction + self.test_fraction > 1:
            raise ValueError(
                f"source.val_fraction={self.val_fraction} and source.test_fraction={self.test_fraction} "
                "are more than 1 together: lower one"
            )
        return self


class MovingShapesConfig(Settings):
    """A small captioned set written by code, in which only the order of frames tells two clips apart."""

    name: Literal["moving_shapes"] = Field("moving_shapes", description="source")
    videos: str = Field(description="folder that the mp4 files are written to; every Ray node must see it")
    num_pairs: PositiveInt = Field(600, description="training pairs of a clip and its frame reversal")
    # The bound is the number of captions there are: no two videos of these splits carry the same one.
    val_pairs: NonNegativeInt = Field(24, le=112, description="pairs in val, each with captions of its own")
    test_pairs: NonNegativeInt = Field(64, le=112, description="pairs in test, each with captions of its own")
    size: PositiveInt = Field(64, ge=32, multiple_of=2, description="width and height in pixels")
    seed: NonNegativeInt = Field(0, description="seed of captions, positions, sizes and backgrounds")


SourceConfig = Annotated[
    CustomConfig
    | MovingShapesConfig
    | MsrvttConfig
    | MsvdConfig
    | LsmdcConfig
    | DidemoConfig
    | ActivityNetConfig
    | VatexConfig
    | TableConfig,
    Field(discriminator="name"),
]


class ShardConfig(Settings):
    """How large a shard may become; a shard is the unit of work, retry and download."""

    max_samples: PositiveInt = Field(1000, description="most clips in a shard")
    max_bytes: PositiveInt = Field(
        256_000_000, description="bytes in a shard, about: as such JPEGs have, or with payload=video the source files"
    )
    compression: PositiveFloat = Field(
        1.0, description="bytes that really come out for each one so expected: below 1, more clips fill a shard"
    )
    shuffle: list[str] = Field(["train"], description="splits whose sources are dealt to shards in a seeded order")


class VideoConfig(Settings):
    """What every video becomes: H.264 in mp4 without sound. A stream that already is small enough is copied.

    The bounds depend on the file alone, so that a clip that breaks one is rejected on every attempt.
    """

    short_side: PositiveInt = Field(256, ge=16, description="shorter side in pixels; smaller videos stay as they are")
    max_fps: PositiveFloat = Field(30.0, description="frames per second; slower videos stay as they are")
    gop: PositiveInt = Field(12, description="frames from one key frame to the next: what a random read decodes")
    crf: NonNegativeInt = Field(23, le=51, description="x264's constant quality, lower is better")
    preset: Literal["ultrafast", "veryfast", "fast", "medium", "slow"] = Field(
        "veryfast", description="x264's speed against size"
    )
    threads: PositiveInt = Field(1, description="threads of one ffmpeg; part of the plan, as the bytes depend on it")
    min_frames: PositiveInt = Field(1, description="a clip of fewer frames is rejected")
    max_duration_s: PositiveFloat = Field(1800.0, description="a longer clip is rejected")
    max_pixels: PositiveInt = Field(36_000_000, description="a clip with more pixels in a source frame is rejected")
    max_bytes: PositiveInt = Field(500_000_000, description="a clip that becomes larger is rejected")
    max_cpu_s: PositiveInt = Field(1800, description="a clip that takes more CPU seconds to convert is rejected")
    timeout_s: PositiveFloat = Field(
        3600.0, description="seconds after which one ffmpeg is killed; the shard is tried again, then fails"
    )


class FramesConfig(Settings):
    """The payload `frames`: JPEGs from equal parts of the clip, in the order of time."""

    segments: PositiveInt = Field(12, description="equal parts of a clip; training draws from each of its own")
    per_segment: PositiveInt = Field(2, description="JPEGs per part, evenly spaced")
    quality: PositiveInt = Field(90, le=95, description="of the JPEGs")


class BuildConfig(Settings):
    """Annotations and videos → shards."""

    source: SourceConfig
    output: str = Field(description="folder or s3://bucket/prefix of the dataset; the same one again resumes")
    payload: Literal["frames", "video"] = Field(
        "frames", description="what a sample holds: JPEGs, read with a fifth of the CPU time, or an mp4 of all frames"
    )
    shards: ShardConfig = ShardConfig()
    video: VideoConfig = VideoConfig()
    frames: FramesConfig = FramesConfig()
    seed: NonNegativeInt = Field(0, description="seed of the order in which sources are dealt to shards")
    max_rejected_fraction: Fraction = Field(0.05, description="share of unreadable clips above which the build fails")
    max_missing_fraction: Fraction = Field(
        0.05, description="share of annotated videos without a file or a caption above which nothing is built"
    )
    workers: PositiveInt | None = Field(
        None, description="shards built at once; null = as many as the cluster has room"
    )
    cpus_per_task: PositiveInt | None = Field(
        None, description="CPUs that Ray reserves per shard; null = video.threads"
    )


class IndexConfig(Settings):
    """WebDataset tars that someone else wrote → a dataset, where they lie."""

    folder: str = Field(description="folder or s3://bucket/prefix of the tars; the markers are written beside them")
    split: str = Field("train", min_length=1, description="split of tars in no folder train, val, validation or test")
    caption: str | None = Field(
        None, description='json key of the captions; null = the .txt, else the json\'s "caption" or "captions"'
    )
    video_ids: Literal["json", "tar"] = Field(
        "json", description="json = its video_id, key or videoid, else the key in the tar; tar = TAR/KEY, always unique"
    )
    max_rejected_fraction: Fraction = Field(0.05, description="share of unusable samples above which nothing is made")
    workers: PositiveInt | None = Field(None, description="tars read at once; null = as many as the cluster has CPUs")
