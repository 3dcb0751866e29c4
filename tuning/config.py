"""The configuration of a study and of promote. Light on purpose: no torch, ray or optuna."""

from collections.abc import Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from common.config import Settings
from training.config import LOWER_IS_BETTER, Metric, TrackingConfig

STUDIES = Path(__file__).parent / "studies"

METRICS = get_args(Metric)
SET_BY_STUDY = ("run", "tracking")
SIZES = ("num_workers", "cpus_per_worker", "gpus_per_worker", "use_gpu", "autoscale")
MAX_GRID_VALUES = 1000
MAX_SEEDS = 100

Number = int | float


class Domain(Settings):
    """Where a value is drawn from: exactly one of the four, while `when` holds."""

    choice: list[Any] | None = Field(None, description="one of these values", min_length=1)
    uniform: tuple[float, float] | None = Field(None, description="a number in [low, high]")
    loguniform: tuple[float, float] | None = Field(None, description="a number in [low, high], its logarithm uniform")
    quniform: tuple[Number, Number, Number] | None = Field(
        None, description="[low, high, step]: one of low, low + step, ... up to high; integers stay integers"
    )
    when: dict[str, Any] = Field(
        {}, description="other keys of the space → the value, or list of values, for which this domain applies"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        given = [name for name, value in self if value is not None and name != "when"]
        if len(given) != 1:
            what = " and ".join(given) or "nothing"
            raise ValueError(f"has {what}: write exactly one of choice, uniform, loguniform, quniform")
        if self.quniform is not None:
            low, high, step = self.quniform
            if not (low < high and step > 0):
                raise ValueError(f"quniform {list(self.quniform)} is no range: write [low, high, step]")
            if (high - low) / step >= MAX_GRID_VALUES:
                raise ValueError(f"quniform {list(self.quniform)} has more than {MAX_GRID_VALUES} values: take uniform")
        elif self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"{given[0]} {list(self.bounds)} is no range: write [low, high]")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform {list(self.loguniform)} needs low > 0")
        return self

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The ends of a range; None for a list of values."""
        return self.uniform or self.loguniform

    @property
    def values(self) -> list[Any] | None:
        """All values, or None if it is a range."""
        if self.quniform is None:
            return self.choice
        low, high, step = self.quniform
        count = int((high - low) / step + 1e-9) + 1
        return [low + i * step if isinstance(step, int) else round(low + i * step, 12) for i in range(count)]

    def applies(self, values: Mapping[str, Any]) -> bool:
        """True if `when` holds for the values of the other keys."""
        return all(key in values and values[key] in self.wanted(key) for key in self.when)

    def wanted(self, key: str) -> list[Any]:
        """The values of another key for which this domain applies."""
        wanted = self.when[key]
        return wanted if isinstance(wanted, list) else [wanted]


class StudyConfig(Settings):
    """Many training runs over sampled values of one base configuration."""

    name: str = Field(
        description="the study's name; its trials' runs are NAME-NUMBER", min_length=1, pattern=r"^[\w.\-]+$"
    )
    storage: str = Field(
        "studies", description="folder or s3:// URL of the study's folder, which holds its trials' runs"
    )
    base: str = Field(description="training preset (name, path or URL) that every trial starts from")
    overrides: dict[str, Any] = Field({}, description="dotted training key → value, the same in all trials")
    space: dict[str, list[Domain]] = Field(
        description="dotted training key → domain of its value, or a list of domains with `when`: the first that "
        "applies is drawn from; if none does, the key is left as it is",
        min_length=1,
    )
    metric: str = Field("r1", description=f"validation metric that is compared: {', '.join(METRICS)}")
    mode: Literal["max", "min"] = Field("max", description="which end of the metric is better")
    cost: Literal["images", "gflops"] | None = Field(
        None,
        description="second objective, to be low: what encoding a video takes, in images or in 1e9 floating-point "
        "operations; the result is then a Pareto front. null = the metric alone",
    )
    searcher: Literal["random", "grid", "tpe"] = Field(
        "random",
        description="how values are drawn; grid = every combination once; tpe = Optuna's, for one or two objectives",
    )
    scheduler: Literal["none", "asha", "median"] = Field(
        "none", description="stops trials that are behind: those not in the best part of a rung, or below the median"
    )
    grace_reports: PositiveInt = Field(1, description="evaluations before a trial may be stopped")
    reduction_factor: int = Field(3, ge=2, description="asha keeps one in this many at each rung")
    trials: PositiveInt | None = Field(None, description="how many trials; may be raised later; null = the whole grid")
    max_concurrent: PositiveInt | None = Field(None, description="trials at once; null = as many as fit the cluster")
    max_failures: NonNegativeInt = Field(2, description="a trial that failed is started again this many times")
    time_budget_s: PositiveFloat | None = Field(
        None, description="seconds after which this start ends; the next goes on with what is unfinished. null = none"
    )
    seed: int = Field(0, ge=0, description="seed of the drawn values; the trials' own seed is an override")
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow of the study and all its trials")

    @field_validator("overrides", mode="before")
    @classmethod
    def _flatten(cls, value: Any) -> Any:
        """`overrides.data.dataset=URL` on the command line arrives nested."""
        return _flat(value) if isinstance(value, Mapping) else value

    @field_validator("space", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        return {key: [domains] if isinstance(domains, Mapping) else domains for key, domains in value.items()}

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_metric(self.metric, self.mode)
        for where, keys in (("overrides", self.overrides), ("space", self.space)):
            for key in keys:
                if key.split(".")[0] in SET_BY_STUDY:
                    raise ValueError(f"{where}: {key} is set by the study: use its name, storage and tracking")
        for key in (f"workers.{size}" for size in SIZES):
            if key in self.space:
                raise ValueError(f"space: trials share the cluster by {key}, so it is one for all: set it in overrides")
        for key in ("eval.every", "eval.select"):
            if key in self.space:
                raise ValueError(f"space: trials are compared by their evaluations, so {key} is one for all: remove it")
        both = sorted({*self.overrides} & {*self.space})
        if both:
            raise ValueError(f"{both[0]} is both in overrides and in space: remove one")
        _check_conditions(self.space)
        if self.cost and self.scheduler != "none":
            raise ValueError(
                f"scheduler={self.scheduler} compares by metric alone, and would stop what is cheap: set none"
            )
        if self.searcher == "grid":
            for key, domains in self.space.items():
                if any(d.values is None for d in domains):
                    raise ValueError(f"searcher=grid cannot list {key}, which is a range: use choice or quniform")
        elif self.trials is None:
            raise ValueError(f"trials is required with searcher={self.searcher}: give trials=...")
        return self

    @property
    def keys(self) -> list[str]:
        """The space's keys, each after those that it depends on."""
        return _in_order(self.space)


class PromoteConfig(Settings):
    """The best trial of a study → a training preset."""

    study: str = Field(description="folder or URL of a study (STORAGE/NAME)")
    preset: str = Field(description="name of the new training preset", min_length=1, pattern=r"^[\w.\-]+$")
    trial: NonNegativeInt | None = Field(None, description="a trial's number; null = the best one")
    folder: str | None = Field(None, description="folder of the preset; null = training/presets")
    confirm: int | None = Field(
        None,
        ge=2,
        le=MAX_SEEDS,
        description="first train it again with this many other seeds, and tell mean and confidence interval",
    )


def _check_metric(metric: str, mode: str) -> None:
    if "test" in metric:
        raise ValueError(f"metric={metric}: the test split must not choose values; take a validation metric such as r1")
    if metric not in METRICS:
        raise ValueError(f"metric={metric} is not one of {', '.join(METRICS)}")
    better = "min" if metric in LOWER_IS_BETTER else "max"
    if mode != better:
        raise ValueError(f"mode={mode} looks for the worst {metric}: set mode={better}")


def _check_conditions(space: Mapping[str, list[Domain]]) -> None:
    for key, domains in space.items():
        for i, domain in enumerate(domains):
            if not domain.when and i + 1 < len(domains):
                raise ValueError(f"space.{key}: only the last of its domains may be without `when`")
            for other in domain.when:
                if other not in space:
                    raise ValueError(f"space.{key}: `when` names {other}, which is not in the space")
                listed = [d.values for d in space[other]]
                for wanted in domain.wanted(other):
                    if not any(wanted in values for values in listed if values is not None):
                        raise ValueError(f"space.{key}: `when` waits for {other}={wanted!r}, which is never drawn")
    _in_order(space)


def _in_order(space: Mapping[str, list[Domain]]) -> list[str]:
    graph = {key: {other for domain in domains for other in domain.when} for key, domains in space.items()}
    try:
        return list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        raise ValueError(f"space: these keys depend on each other in a circle: {', '.join(error.args[1])}") from None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys; the value of a dotted key stays whole."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and "." not in key:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
