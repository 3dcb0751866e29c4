"""The configuration of a study and of promote. Light on purpose: no torch, ray or mlflow."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from common.config import Settings
from training.config import TrackingConfig

STUDIES = Path(__file__).parent / "studies"

RECALLS = ("r1", "r5", "r10", "r50", "rsum")
HIGHER_IS_BETTER = (*RECALLS, *(f"v2t_{name}" for name in RECALLS), "order")
LOWER_IS_BETTER = ("mdr", "mnr", "v2t_mdr", "v2t_mnr")  # ranks
METRICS = (*HIGHER_IS_BETTER, *LOWER_IS_BETTER)
SET_BY_STUDY = ("run", "tracking")


class Domain(Settings):
    """Where a value is drawn from: exactly one of the three."""

    choice: list[Any] | None = Field(None, description="one of these values", min_length=1)
    uniform: tuple[float, float] | None = Field(None, description="a number in [low, high)")
    loguniform: tuple[float, float] | None = Field(None, description="a number in [low, high), its logarithm uniform")

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name, value in self if value is not None]
        if len(given) != 1:
            what = " and ".join(given) or "nothing"
            raise ValueError(f"has {what}: write exactly one of choice, uniform, loguniform")
        bounds = self.uniform or self.loguniform
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError(f"{given[0]} {list(bounds)} is no range: write [low, high]")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform {list(self.loguniform)} needs low > 0")
        return self


class StudyConfig(Settings):
    """Many training runs over sampled values of one base configuration."""

    name: str = Field(
        description="the study's name; its trials' runs are NAME-TRIAL", min_length=1, pattern=r"^[\w.\-]+$"
    )
    storage: str = Field("studies", description="folder or s3:// URL of the study's folder and its trials' runs")
    base: str = Field(description="training preset (name, path or URL) that every trial starts from")
    overrides: dict[str, Any] = Field({}, description="dotted training key → value, the same in all trials")
    space: dict[str, Domain] = Field(description="dotted training key → domain of its value", min_length=1)
    metric: str = Field("r1", description=f"validation metric that is compared: {', '.join(METRICS)}")
    mode: Literal["max", "min"] = Field("max", description="which end of the metric is better")
    searcher: Literal["random", "optuna"] = Field("random", description="how values are drawn; optuna = TPE")
    scheduler: Literal["none", "asha"] = Field("none", description="asha stops trials that are behind")
    grace_reports: PositiveInt = Field(1, description="evaluations before asha may stop a trial")
    reduction_factor: int = Field(3, ge=2, description="asha keeps one in this many at each rung")
    trials: PositiveInt = Field(description="how many trials")
    max_concurrent: PositiveInt | None = Field(None, description="trials at once; null = as many as fit the cluster")
    seed: int = Field(0, ge=0, description="seed of the drawn values; the trials' own seed is an override")
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow of the study and all its trials")

    @field_validator("overrides", mode="before")
    @classmethod
    def _flatten(cls, value: Any) -> Any:
        """`overrides.data.dataset=URL` on the command line arrives nested."""
        return _flat(value) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_metric(self.metric, self.mode)
        for where, keys in (("overrides", self.overrides), ("space", self.space)):
            for key in keys:
                if key.split(".")[0] in SET_BY_STUDY:
                    raise ValueError(f"{where}: {key} is set by the study: use its name, storage and tracking")
        both = sorted({*self.overrides} & {*self.space})
        if both:
            raise ValueError(f"{both[0]} is both in overrides and in space: remove one")
        return self


class PromoteConfig(Settings):
    """The best trial of a study → a training preset."""

    study: str = Field(description="folder or URL of a finished study (STORAGE/NAME)")
    preset: str = Field(description="name of the new training preset", min_length=1, pattern=r"^[\w.\-]+$")
    trial: str | None = Field(None, description="a trial's id; null = the best one")
    folder: str | None = Field(None, description="folder of the preset; null = training/presets")


def _check_metric(metric: str, mode: str) -> None:
    if "test" in metric:
        raise ValueError(f"metric={metric}: the test split must not choose values; take a validation metric such as r1")
    if metric not in METRICS:
        raise ValueError(f"metric={metric} is not one of {', '.join(METRICS)}")
    better = "max" if metric in HIGHER_IS_BETTER else "min"
    if mode != better:
        raise ValueError(f"mode={mode} looks for the worst {metric}: set mode={better}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; the value of a dotted key stays whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and "." not in key:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
