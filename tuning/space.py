"""The space of a study: every key and value checked before the first trial, and its combinations listed.

The check needs no Ray, so a typo costs a second on the client and not a trial on the cluster.
"""

import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from common import config as configs
from common.errors import ConfigError
from training.config import PRESETS, TrainConfig
from tuning.config import Domain, StudyConfig

MAX_CHECKED = 2_000  # combinations, or pairs of values: a second or two
Of = Callable[[str, Domain], list[Any]]


def resolve(study: StudyConfig) -> TrainConfig:
    """The configuration that all trials start from, after checking the whole space against it.

    Raises:
        ConfigError: unknown key, bad value or bad combination of values in `overrides` or `space`.
    """
    values = {
        "run": {"name": study.name, "storage": study.storage},
        "tracking": study.tracking.model_dump(mode="json"),
        **study.overrides,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    base = configs.load(TrainConfig, study.base, overrides, PRESETS)
    for _ in configurations(study, base):
        pass
    return base


def configurations(study: StudyConfig, base: TrainConfig) -> Iterator[TrainConfig]:
    """Those of all combinations of listed values, or of many; a range is there by its ends and a number between.

    Raises:
        ConfigError: one is bad.
    """
    is_range = any(domain.bounds for domains in study.space.values() for domain in domains)
    for place in (0.0, 1.0, 0.381966) if is_range else (0.0,):  # the last is one that an integer field refuses
        for sampled in _to_check(study, lambda key, domain, place=place: _listed(domain, place)):  # type: ignore[misc]
            try:
                yield trial_config(study, base, sampled)
            except ConfigError as error:
                raise ConfigError(f"space: {error}{_hint(study, sampled, str(error))}") from None


def trial_config(study: StudyConfig, base: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """`base` with a trial's sampled values. Raises ConfigError.

    Unless study or trial say otherwise, checkpoints come with evaluations, so that a trial that goes on meets each of
    its evaluations once, and `best/` is selected by the study's metric.
    """
    given = {*study.overrides, *values}
    derived: dict[str, Any] = {}
    if "checkpoint.every" not in given:
        derived["checkpoint.every"] = base.eval.every
    if "eval.select" not in given:
        derived["eval.select"] = study.metric
    config = configs.apply(base, {**values, **derived})
    if config.data.val is None:
        raise ConfigError("data.val is null: trials are compared on the validation split, so set data.val in overrides")
    if config.optim.steps == 0:
        raise ConfigError("optim.steps=0 trains nothing, so there is nothing to compare: set it in overrides")
    if config.checkpoint.every % config.eval.every:
        raise ConfigError(
            f"checkpoint.every={config.checkpoint.every} is no multiple of eval.every={config.eval.every}: "
            "a checkpoint without an evaluation reports no metric; leave checkpoint.every out"
        )
    return config


def domain_of(study: StudyConfig, key: str, values: Mapping[str, Any]) -> Domain | None:
    """The domain of a key beside the values of those that it depends on; None if it is left as it is."""
    return next((domain for domain in study.space[key] if domain.applies(values)), None)


def combinations(study: StudyConfig, of: Of = lambda key, domain: domain.values or []) -> Iterator[dict[str, Any]]:
    """Every combination of values, in the order of the keys, where `of` lists those of a domain."""
    return _extended(study, study.keys, {}, of)


def _extended(study: StudyConfig, keys: list[str], values: dict[str, Any], of: Of) -> Iterator[dict[str, Any]]:
    if not keys:
        yield values
        return
    key, *rest = keys
    domain = domain_of(study, key, values)
    if domain is None:
        yield from _extended(study, rest, values, of)
        return
    for value in of(key, domain):
        yield from _extended(study, rest, {**values, key: value}, of)


def _to_check(study: StudyConfig, of: Of) -> Iterator[dict[str, Any]]:
    """All combinations if they are few; else pairs of two keys' values, all or many, the others drawn."""
    few = list(itertools.islice(combinations(study, of), MAX_CHECKED + 1))
    if len(few) <= MAX_CHECKED:
        yield from few
        return
    draw = random.Random(0)
    every = [(key, value) for key, domains in study.space.items() for d in domains for value in of(key, d)]
    pairs = list(itertools.combinations(every, 2))
    for one, other in pairs if len(pairs) <= MAX_CHECKED else draw.sample(pairs, MAX_CHECKED):
        forced = dict([one, other])

        def drawn(key: str, domain: Domain, forced: dict[str, Any] = forced) -> list[Any]:
            listed = of(key, domain)
            if key in forced:
                return [forced[key]] if forced[key] in listed else []
            return [draw.choice(listed)]

        yield from combinations(study, drawn)


def _listed(domain: Domain, place: float) -> list[Any]:
    """All values of a list; of a range the number at `place` of the way."""
    if domain.values is not None:
        return domain.values
    assert domain.bounds is not None
    low, high = domain.bounds
    return [low + place * (high - low)]


def _hint(study: StudyConfig, values: Mapping[str, Any], error: str) -> str:
    """What to do about a combination that is refused."""
    named = [key for key in values if key in error]
    if len(named) > 1:
        return f"; give {named[-1]} a list of domains with `when: {{{named[0]}: ...}}`, so that only what fits is drawn"
    if any(domain.bounds for key in named for domain in study.space[key]):
        return " (a range draws any number in it: use choice or quniform for a list)"
    return ""
