"""The configuration of a local cluster, and the schema of each command that can be submitted. Light: no ray."""

from pathlib import Path

from pydantic import Field, PositiveInt

import datasets_prep.config
import retrieval.config
import training.config
import tuning.config
from common.config import Settings

# Module → the schema of its configuration, the folder of its presets, and the keys that a job needs absolute.
COMMANDS: dict[str, tuple[type[Settings], Path, tuple[str, ...]]] = {
    "datasets_prep.build": (
        datasets_prep.config.BuildConfig,
        datasets_prep.config.PRESETS,
        ("output", "source.videos"),
    ),
    "training.train": (training.config.TrainConfig, training.config.PRESETS, training.config.PATHS),
    "retrieval.embed": (retrieval.config.EmbedConfig, retrieval.config.PRESETS / "embed", ("run", "dataset", "output")),
    "retrieval.index": (retrieval.config.IndexConfig, retrieval.config.PRESETS / "index", ("embeddings", "output")),
    "tuning.study": (tuning.config.StudyConfig, tuning.config.STUDIES, ("storage", "tracking.uri")),
}
# The configuration of these is that of a run, which lies in its folder; they travel as they are.
OF_A_RUN: dict[str, tuple[type[Settings], tuple[str, ...]]] = {
    "training.evaluate": (training.config.EvaluateConfig, ("report", "recall", "questions", "labels")),
    "training.caption": (training.config.CaptionRun, ("captions.output",)),
}
# Of these only the words are looked at: files, folders and URLs.
OF_URLS = ("training.export", "training.import_official", "datasets_prep.index", "datasets_prep.verify")


class LocalConfig(Settings):
    """What `python -m cluster.local up` starts."""

    folder: str = Field("runs/local", description="folder for logs, credentials, state and the S3 server's data")
    nodes: PositiveInt = Field(1, description="Ray nodes, the head among them")
    cpus_per_node: PositiveInt = Field(2, description="logical CPUs of each Ray node")
    namespaces: bool = Field(
        False, description="each node in a network namespace with an IP address of its own; needs root and iproute2"
    )
    s3: bool = Field(True, description="also start an S3 server")
    mlflow: bool = Field(True, description="also start an MLflow server; its address is MLFLOW_TRACKING_URI")
    buckets: list[str] = Field(["datasets", "runs"], description="buckets of the S3 server", min_length=1)
