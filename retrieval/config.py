"""The configurations of embed, index and search. Light on purpose: no torch, ray or faiss."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from common.config import Settings

PRESETS = Path(__file__).parent / "presets"  # one folder per entry point


class EmbedConfig(Settings):
    """Videos of a split → vectors, or features to re-rank by."""

    run: str = Field(description="folder or URL of a training run (STORAGE/NAME); its best weights are used")
    dataset: str | None = Field(None, description="URL of a prepared dataset; null = the run's own")
    split: str = Field("test", description="split to embed")
    output: str = Field(description="folder or s3:// URL for them; the same one again resumes")
    dtype: Literal["float16", "float32"] = Field("float16", description="number format of what is stored")
    views: PositiveInt | None = Field(
        None, description="clips per video that are averaged; null = the run's eval.views"
    )
    batch_size: PositiveInt = Field(32, description="videos per forward pass")
    actors: PositiveInt | None = Field(None, description="encoding processes; null = as many as the cluster holds now")
    cpus_per_actor: PositiveInt = Field(2, description="CPUs, and decoding threads, per actor")
    use_gpu: bool | None = Field(None, description="one GPU per actor; null = if the cluster has GPUs")
    start_timeout_s: PositiveInt = Field(600, description="seconds to wait for the first actor's resources")
    cache: str = Field("~/.cache/text-video-retrieval", description="node-local folder for shards")
    cache_bytes: PositiveInt = Field(200 * 1024**3, description="size limit of the cache in bytes")


class IndexConfig(Settings):
    """Vectors → index."""

    embeddings: str = Field(description="folder or URL that retrieval.embed wrote")
    output: str = Field(description="folder or s3:// URL for the index; an older one there is replaced")


class SearchConfig(Settings):
    """A sentence → ranked videos."""

    index: str = Field(description="folder or URL that retrieval.index wrote")
    query: str = Field(description="the sentence to search for", min_length=1)
    k: PositiveInt = Field(10, description="videos to show")
    format: Literal["table", "json"] = Field("table", description="what goes to stdout; --json is short for json")
    contact_sheet: str | None = Field(None, description="also write the result with frames to this .html file or URL")
    frames: PositiveInt = Field(6, description="frames per video in the contact sheet")
    run: str | None = Field(None, description="the run's folder, if it is no longer where the index says")
    dataset: str | None = Field(None, description="the dataset's URL, if it is no longer where the index says")
    rerank: str | None = Field(
        None,
        description="features that retrieval.embed wrote of a run with model.scorer: it orders what the index finds",
    )
    rerank_top: PositiveInt = Field(100, description="videos that the index finds for the scorer to order")
    rerank_run: str | None = Field(None, description="the scorer's run, if it is no longer where the features say")
    captions: str | None = Field(
        None, description=".jsonl that training.caption wrote, to show what it says of a video"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rerank and self.k > self.rerank_top:
            raise ValueError(
                f"k={self.k} is more than the rerank_top={self.rerank_top} videos that are re-ranked: raise rerank_top"
            )
        return self
