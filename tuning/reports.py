"""What Ray Train tells Ray Tune of a trial. A module of its own, so that Ray's controller imports it at once."""

from typing import Any

from ray.tune.integration.ray_train import TuneReportCallback


class Reports(TuneReportCallback):
    """Passes on each report of rank 0, with the number of ranks, which may change during a run."""

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        super().after_report(run_context, [{**metrics[0], "ranks": len(metrics)}], checkpoint)
