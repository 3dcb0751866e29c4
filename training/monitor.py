"""A run as Prometheus sees it: Ray's metrics, which every node exports. docs/operations.md says what to look at."""

from collections.abc import Mapping

from ray.util.metrics import Counter, Gauge

from common import counts

GAUGES = {
    "loss": "of the last logged step, over all ranks",
    "samples_per_s": "trained on by all ranks since the last log line",
    "data_wait": "share of its time that rank 0 waits for data, 0 to 1",
    "step_s": "seconds a step takes",
    "cores_needed": "CPU cores a rank needs to never wait for data",
}
COUNTERS = {
    "shards_cached": "shards that were downloaded to a node's cache",
    "retries": "operations of storage that were tried again after some seconds",
    "s3_errors": "requests to S3 that failed, those that are tried again at once among them",
}


class Monitor:
    """Gauges of rank 0 and counters of every rank, as ray_training_NAME{run="URL"}."""

    def __init__(self, run: str) -> None:
        about = {"tag_keys": ("run",)}
        self.gauges = {name: Gauge(f"training_{name}", text, **about) for name, text in GAUGES.items()}
        self.counters = {name: Counter(f"training_{name}", text, **about) for name, text in COUNTERS.items()}
        for metric in (*self.gauges.values(), *self.counters.values()):
            metric.set_default_tags({"run": run})

    def show(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.gauges[name].set(value)

    def count(self) -> None:
        """Add what happened in this process, and in those that decode for it, since the last call."""
        for name, count in counts.take().items():
            self.counters[name].inc(count)
