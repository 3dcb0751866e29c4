"""The space of a study: every key and value checked before the first trial, then domains for Ray Tune.

The check needs no Ray, so a typo costs a second on the client and not a trial on the cluster.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from common import config as configs
from common.errors import ConfigError
from training.config import PRESETS, EvalConfig, TrainConfig
from tuning.config import Domain, StudyConfig

SELECTABLE = get_args(EvalConfig.model_fields["select"].annotation)


def resolve(study: StudyConfig) -> TrainConfig:
    """The configuration that all trials start from, after checking the whole space against it.

    Each value is tried alone; a combination that the training configuration refuses is a failed trial later.

    Raises:
        ConfigError: unknown key or bad value in `overrides` or `space`.
    """
    values = {
        "run": {"name": study.name, "storage": study.storage},
        "tracking": study.tracking.model_dump(mode="json"),
        **study.overrides,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    base = configs.load(TrainConfig, study.base, overrides, PRESETS)
    base = trial_config(study, base, {})
    if base.data.val is None:
        raise ConfigError("data.val is null: trials are compared on the validation split, so set data.val in overrides")
    if study.metric == "order" and not base.eval.twins:
        raise ConfigError("metric=order needs eval.twins=true in overrides")
    for key, domain in study.space.items():
        for value in _probes(domain):
            try:
                trial_config(study, base, {key: value})
            except ConfigError as error:
                hint = "" if domain.choice is not None else " (a range draws any number in it: use choice for a list)"
                raise ConfigError(f"space: {error}{hint}") from None
    return base


def trial_config(study: StudyConfig, base: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """`base` with a trial's sampled values. Raises ConfigError.

    Unless study or trial say otherwise, checkpoints come with evaluations, since each report that Tune sees must hold
    the metric, and `best/` is selected by the study's metric.
    """
    config = configs.apply(base, values)
    given = {*study.overrides, *values}
    derived: dict[str, Any] = {}
    if "checkpoint.every" not in given:
        derived["checkpoint.every"] = config.eval.every
    if "eval.select" not in given and study.metric in SELECTABLE:
        derived["eval.select"] = study.metric
    config = configs.apply(config, derived)
    if config.checkpoint.every % config.eval.every:
        raise ConfigError(
            f"checkpoint.every={config.checkpoint.every} is no multiple of eval.every={config.eval.every}: "
            "a checkpoint without an evaluation reports no metric; leave checkpoint.every out"
        )
    return config


def domains(study: StudyConfig) -> dict[str, Any]:
    """The space as ray.tune's domains, by dotted key."""
    from ray import tune

    def of(domain: Domain) -> Any:
        if domain.choice is not None:
            return tune.choice(domain.choice)
        if domain.uniform is not None:
            return tune.uniform(*domain.uniform)
        assert domain.loguniform is not None
        return tune.loguniform(*domain.loguniform)

    return {key: of(domain) for key, domain in study.space.items()}


def plain(value: Any) -> Any:
    """A sampled value as plain data: some searchers draw numpy numbers, which JSON and YAML refuse."""
    return value.item() if hasattr(value, "item") else value


def _probes(domain: Domain) -> Iterator[Any]:
    """All choices; of a range its ends and a number between, which an integer field refuses."""
    if domain.choice is not None:
        yield from domain.choice
        return
    bounds = domain.uniform or domain.loguniform
    assert bounds is not None
    low, high = bounds
    yield from (low, high, low + (high - low) * 0.381966)
