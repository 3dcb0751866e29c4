"""The configuration of a local cluster. Light on purpose: no ray."""

from pydantic import Field, PositiveInt

from common.config import Settings


class LocalConfig(Settings):
    """What `python -m cluster.local up` starts."""

    folder: str = Field("runs/local", description="folder for logs, credentials, state and the S3 server's data")
    nodes: PositiveInt = Field(1, description="Ray nodes, the head among them")
    cpus_per_node: PositiveInt = Field(2, description="logical CPUs of each Ray node")
    s3: bool = Field(True, description="also start an S3 server")
    buckets: list[str] = Field(["datasets", "runs"], description="buckets of the S3 server", min_length=1)
