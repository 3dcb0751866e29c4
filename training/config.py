"""The configuration of a training run. Light on purpose: no torch, ray or open_clip, so that a client can check it."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from common import storage
from common.config import Settings
from training.model_config import ModelConfig, VoPConfig

PRESETS = Path(__file__).parent / "presets"
PATHS = (
    "run.storage",
    "data.dataset",
    "model.init_from",
    "tracking.uri",
)  # what a job that is submitted needs absolute

Fraction = Annotated[float, Field(ge=0, le=1)]


class RunSettings(Settings):
    """A run's identity: starting the same (name, storage) again resumes it."""

    name: str = Field(description="the run's name, unique in its storage", min_length=1, pattern=r"^[\w.\-]+$")
    storage: str = Field("runs", description="folder or s3:// URL that holds the run's folder")


class DataConfig(Settings):
    dataset: str = Field(description="URL of a prepared dataset (the folder with dataset.json)")
    train: list[str] = Field(["train"], description="splits to train on", min_length=1)
    val: str | None = Field("val", description="split for model selection, or null")
    test: str | None = Field("test", description="split evaluated once at the end, or null")
    lanes: PositiveInt = Field(64, description="lanes of the sample order: the most ranks that see the same batches")
    shuffle_shards: PositiveInt = Field(16, description="samples are shuffled inside blocks of this many shards")
    crop_scale: tuple[Fraction, Fraction] = Field(
        (0.5, 1.0), description="area of the random training crop; [1, 1] = the centre square, as in evaluation"
    )
    flip: bool = Field(False, description="random horizontal flip (official code: true; wrong where captions say left)")
    cache: str = Field("~/.cache/text-video-retrieval", description="node-local folder for shards")
    cache_bytes: PositiveInt = Field(200 * 1024**3, description="size limit of the cache in bytes")


class LossConfig(Settings):
    contrastive: float = Field(1.0, ge=0, description="weight of the contrastive loss")
    frame_contrastive: float = Field(
        0.0, ge=0, description="weight of the contrastive loss of captions and single frames (beyond the paper)"
    )
    temperature: float | None = Field(
        None, ge=0.01, description="temperature that training starts from; null = the backbone's (OpenAI's CLIP: 0.01)"
    )
    caption: float = Field(0.0, ge=0, description="weight of the caption loss; needs model.captioner")

    @property
    def reads_text(self) -> bool:
        """True if the objective needs the text tower."""
        return bool(self.contrastive or self.frame_contrastive)

    frequent_weight: Fraction = Field(
        0.25, description="weight of frequent words in the caption loss (1 = plain, as the paper's excerpt reads)"
    )


class OptimConfig(Settings):
    steps: NonNegativeInt = Field(description="optimiser steps; 0 = measure and keep what is there: zero-shot CLIP")
    batch_size: PositiveInt = Field(128, description="videos per step over all ranks")
    lr: PositiveFloat = Field(1e-6, description="peak learning rate of the backbone")
    lr_new: PositiveFloat = Field(3e-5, description="peak learning rate of what is not CLIP (prompts, heads, ...)")
    weight_decay: float = Field(0.2, ge=0, description="AdamW's decay of matrices; gains and biases are not decayed")
    betas: tuple[Fraction, Fraction] = Field(
        (0.9, 0.999), description="AdamW's betas (CLIP4Clip and what follows its code: 0.9 and 0.98)"
    )
    eps: PositiveFloat = Field(1e-6, description="AdamW's epsilon (official code: 1e-6; a random model needs 1e-8)")
    warmup: Fraction = Field(0.1, description="fraction of the steps with linear warm-up, then cosine to 0")
    grad_clip: PositiveFloat = Field(1.0, description="largest norm of the gradient")
    ema: float | None = Field(
        None, gt=0, lt=1, description="decay of a moving average of the weights, which is what is evaluated and kept"
    )


Metric = Literal[
    "r1", "r5", "r10", "r50", "rsum", "mdr", "mnr",
    "v2t_r1", "v2t_r5", "v2t_r10", "v2t_r50", "v2t_rsum", "v2t_mdr", "v2t_mnr", "order",
]  # fmt: skip
LOWER_IS_BETTER = ("mdr", "mnr", "v2t_mdr", "v2t_mnr")  # ranks


class EvalConfig(Settings):
    every: PositiveInt = Field(1000, description="steps between evaluations on data.val; also at the end")
    views: PositiveInt = Field(2, description="clips of num_frames per video, averaged (official: 12 frames as 2 x 6)")
    batch_size: PositiveInt = Field(32, description="videos per rank and forward pass")
    select: Metric = Field("r1", description="val metric that selects best/")
    twins: bool = Field(
        False, description="also the order score: two videos of one source_id are each other's frame reversal"
    )
    shared_captions: bool = Field(
        True, description="a sentence finds every video that has it, word for word; the field's protocol: false"
    )
    rerank_top: PositiveInt | None = Field(
        None, description="a scorer ranks only this many that the towers' own vectors find first; null = all"
    )
    dsl_temperature: PositiveFloat | None = Field(
        None,
        description="also the metrics after a dual softmax at this temperature (the field: 0.01), which reads all "
        "queries of the split before it answers one; null = without",
    )

    @field_validator("select", mode="before")
    @classmethod
    def _check_select(cls, value: object) -> object:
        if isinstance(value, str) and value.startswith("dsl_"):
            raise ValueError(
                "a dual softmax reads all queries before it answers one, so it selects no weights: take r1"
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rerank_top and self.dsl_temperature:
            raise ValueError("eval.dsl_temperature needs the scores of all pairs: set eval.rerank_top to null")
        return self


class CheckpointConfig(Settings):
    every: PositiveInt = Field(1000, description="steps between checkpoints; also at the end")
    keep: int = Field(2, ge=2, description="newest checkpoints kept for resume")
    upload_timeout_s: PositiveInt = Field(900, description="seconds until an upload that does not end is an error")


class WorkerConfig(Settings):
    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="ranks; [least, most] = as many as there is room for; null = one per GPU, else 2 on CPU"
    )
    chunk_size: PositiveInt | None = Field(
        None, description="most videos in a forward pass: less memory, a third more work, the same update; null = all"
    )
    use_gpu: bool | None = Field(None, description="null = if the cluster has GPUs")
    loader_workers: int | None = Field(
        None, ge=0, description="decoding processes per rank; null = what a node has for each of its GPUs, 1 without"
    )
    cpus_per_worker: PositiveFloat | None = Field(None, description="CPUs per rank; null = loader_workers + 1")
    gpus_per_worker: float = Field(
        1, gt=0, le=1, description="GPUs per rank; less than 1, for several runs on one GPU, needs num_workers=1"
    )
    threads: PositiveInt = Field(1, description="torch threads per rank on CPU")
    bf16: bool = Field(True, description="bf16 autocast on GPUs that have it; CPUs always run in fp32")
    compile: bool = Field(False, description="torch.compile the towers: a minute at the start, then faster on GPUs")
    checkpoint_activations: bool = Field(
        False, description="make activations again in the backward pass: less memory, a third more work"
    )
    max_failures: int = Field(3, ge=-1, description="restarts after a failed worker; -1 = without end")
    timeout_s: PositiveInt = Field(
        600, description="seconds until a collective that hangs, or a worker that does not answer Ray, is an error"
    )
    drain_every: PositiveInt = Field(
        10, description="steps between looks whether a node is being taken away; while one is, each look saves"
    )
    resize_s: PositiveFloat = Field(
        60.0, description="seconds between looks whether there is room for more ranks; a change is a restart"
    )
    autoscale: bool = Field(False, description="the cluster grows: wait for resources that it does not have yet")
    start_timeout_s: PositiveInt = Field(600, description="seconds to wait for the workers' resources")


class TrackingConfig(Settings):
    uri: str = Field("sqlite:///mlflow.db", description="MLflow tracking URI; a local one is made absolute")
    experiment: str = Field("text-video-retrieval", description="MLflow experiment")
    artifacts: str | None = Field(None, description="artifact folder or s3:// URL of a new experiment; null = mlruns/")
    log_every: PositiveInt = Field(20, description="steps between log lines")
    samples: str | None = Field(
        None, description="local folder for a log of the video ids of every step and rank, to prove the order; null"
    )


class TrainConfig(Settings):
    """A whole training run."""

    run: RunSettings
    seed: int = Field(0, ge=0, description="seed of weights, sample order and random frames")
    data: DataConfig
    model: ModelConfig
    losses: LossConfig = LossConfig()
    optim: OptimConfig
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    workers: WorkerConfig = WorkerConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.losses.caption and self.model.captioner is None:
            raise ValueError(f"losses.caption={self.losses.caption} needs a caption head: set model.captioner.layers=2")
        if self.model.captioner and not self.losses.caption:
            raise ValueError("model.captioner without a loss is never trained: set losses.caption=0.5, or it to null")
        if not self.losses.caption and not self.losses.reads_text:
            raise ValueError("losses.contrastive=0 and losses.caption=0 leave nothing to train")
        scorer = self.model.scorer
        if scorer and self.losses.frame_contrastive:
            raise ValueError("losses.frame_contrastive has no meaning under model.scorer: set it to 0")
        if self.losses.frame_contrastive and self.model.name == "clip_vip":
            raise ValueError("losses.frame_contrastive has no meaning for clip_vip, a clip of one vector: set it to 0")
        # A scorer reads the end token, such towers what is behind it.
        if scorer and isinstance(self.model, VoPConfig) and self.model.text_suffix:
            raise ValueError("model.text_suffix has no meaning under model.scorer: set it to 0")
        if scorer and scorer.counts_frames and self.eval.views > 1:
            raise ValueError(
                f"eval.views={self.eval.views} of model.num_frames={self.model.num_frames} are more frames than the "
                f"scorer {scorer.name} is made for: set eval.views=1"
            )
        if self.eval.select == "order" and not self.eval.twins:
            raise ValueError("eval.select=order needs eval.twins=true")
        if self.eval.rerank_top and not self.model.scorer:
            raise ValueError(f"eval.rerank_top={self.eval.rerank_top} needs model.scorer: set it to null")
        if not 0 < self.data.crop_scale[0] <= self.data.crop_scale[1]:
            raise ValueError(f"data.crop_scale={list(self.data.crop_scale)} is no range: write [low, high], low > 0")
        if urlsplit(
            self.tracking.uri
        ).password:  # it would be shown in config.yaml, logs and MLflow; so is no value here
            raise ValueError(
                "tracking.uri holds a password: leave it out and set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD in the nodes' environment"
            )
        ranks = self.workers.num_workers
        if isinstance(ranks, tuple) and ranks[0] > ranks[1]:
            raise ValueError(f"workers.num_workers={list(ranks)} is no range: write [least, most]")
        if self.workers.gpus_per_worker < 1 and ranks != 1:  # NCCL takes a GPU for one rank only
            raise ValueError(f"workers.gpus_per_worker={self.workers.gpus_per_worker:g} needs workers.num_workers=1")
        if not self.data.test and not self.data.val:
            raise ValueError("data.val and data.test are both null: nothing could be measured")
        return self


class CaptionConfig(Settings):
    """How captions are written."""

    beams: PositiveInt = Field(5, description="hypotheses kept of each caption while it is written; 1 = greedy")
    max_tokens: int = Field(30, ge=3, description="longest caption, in tokens with start and end")
    length_penalty: float = Field(
        1.0, ge=0, description="hypotheses compete by log-probability / tokens ** this: 1 = mean of a token, 0 = sum"
    )
    output: str | None = Field(None, description=".jsonl file or URL for the captions; null = RUN/captions/SPLIT.jsonl")


class CaptionRun(TrainConfig):
    """A finished run whose caption head writes."""

    captions: CaptionConfig = CaptionConfig()

    @model_validator(mode="after")
    def _check_captioner(self) -> Self:
        if self.model.captioner is None:
            raise ValueError(
                f"run {self.run.name} was trained with model.captioner=null, so it can't write captions: give a run "
                "with model.captioner and losses.caption"
            )
        if self.data.test is None:
            raise ValueError("data.test=null names no split to write captions for: give data.test=SPLIT")
        return self


class EvaluateConfig(TrainConfig):
    """A run, and what `training.evaluate` does with it beside `eval`."""

    report: str | None = Field(
        None, description="folder or s3:// URL for report.json and report.html; null = a new one in RUN/evaluations"
    )
    recall: str | None = Field(
        None, description="two-tower run whose vectors find the candidates of eval.rerank_top; null = the run's own"
    )
    questions: str | None = Field(
        None, description="file of multiple-choice questions about the split's videos (docs/evaluation.md); null = none"
    )
    labels: str | None = Field(
        None, description="file of the videos' classes, to recognise actions by their names; null = none"
    )
    templates: list[str] = Field(
        ["a video of {}."], description="sentences that ask for a class, its name in place of {}", min_length=1
    )
    resamples: PositiveInt = Field(1000, description="draws of the bootstrap over videos")
    confidence: float = Field(0.95, gt=0, lt=1, description="of the intervals")
    examples: NonNegativeInt = Field(4, description="easiest, and hardest, queries shown with frames")

    @model_validator(mode="after")
    def _check_recall(self) -> Self:
        if self.recall and not self.eval.rerank_top:
            raise ValueError("recall needs eval.rerank_top, how many of what it finds are ranked again")
        return self

    @field_validator("templates")
    @classmethod
    def _check_templates(cls, value: list[str]) -> list[str]:
        if not all("{}" in template for template in value):
            raise ValueError("every template needs {} where the name of the class goes")
        return value


def run_lines(argv: Sequence[str]) -> list[list[str]]:
    """Of `RUN [RUN ...] key=value ...` a line per run: its configuration as preset, its folder where it is now."""
    if not argv or argv[0].startswith("-"):
        return [list(argv)]
    runs = [argv[0], *itertools.takewhile(lambda a: "=" not in a and not a.startswith("-"), argv[1:])]
    lines = []
    for given in runs:
        run = storage.absolute(given.removesuffix("/config.yaml").rstrip("/"))
        folder, _, name = run.rpartition("/")
        keys = argv[len(runs) :]
        lines.append([storage.join(run, "config.yaml"), f"run.storage={folder}", f"run.name={name}", *keys])
    return lines
