"""The configuration of a local cluster, and the schema of each command that can be submitted. Light: no ray."""

from pathlib import Path

from pydantic import Field, PositiveInt

import datasets_prep.config
import retrieval.config
import training.config
import tuning.config
from common.config import Settings

# Module → the schema of its configuration, and the folder of its presets.
COMMANDS: dict[str, tuple[type[Settings], Path]] = {
    "datasets_prep.build": (datasets_prep.config.BuildConfig, datasets_prep.config.PRESETS),
    "training.train": (training.config.TrainConfig, training.config.PRESETS),
    "retrieval.embed": (retrieval.config.EmbedConfig, retrieval.config.PRESETS / "embed"),
    "retrieval.index": (retrieval.config.IndexConfig, retrieval.config.PRESETS / "index"),
    "tuning.study": (tuning.config.StudyConfig, tuning.config.STUDIES),
}


class LocalConfig(Settings):
    """What `python -m cluster.local up` starts."""

    folder: str = Field("runs/local", description="folder for logs, credentials, state and the S3 server's data")
    nodes: PositiveInt = Field(1, description="Ray nodes, the head among them")
    cpus_per_node: PositiveInt = Field(2, description="logical CPUs of each Ray node")
    s3: bool = Field(True, description="also start an S3 server")
    buckets: list[str] = Field(["datasets", "runs"], description="buckets of the S3 server", min_length=1)
