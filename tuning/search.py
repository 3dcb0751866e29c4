"""Which values the next trial gets: a function of the study and of the records of the trials before it.

Optuna draws them, from a study of its own that is made anew from the records each time. So its history is whatever
the records hold, also after a restart.
"""

import itertools
import json
import logging
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from common.errors import ConfigError
from training.config import TrainConfig
from tuning.config import Domain, StudyConfig
from tuning.records import Record, Records
from tuning.space import combinations, domain_of, trial_config

MAX_DRAWS = 50  # of values that are all known already
STATES = {"running": TrialState.RUNNING, "finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED}
log = logging.getLogger(__name__)
optuna.logging.set_verbosity(optuna.logging.WARNING)


def propose(study: StudyConfig, base: TrainConfig, records: Records) -> dict[str, Any] | None:
    """Values for one more trial, whose configuration no trial before it has; None if there are no others."""
    known = {_identity(study, base, r.values) for r in records}
    for values in itertools.chain(_drawn(study, records), _grid(study)):
        try:
            if _identity(study, base, values) not in known:
                return values
        except ConfigError as error:  # of a space that is too large to have been checked whole
            log.warning("not drawn: %s", error)
    return None


def _identity(study: StudyConfig, base: TrainConfig, values: Mapping[str, Any]) -> str:
    return trial_config(study, base, values).model_dump_json()


def _drawn(study: StudyConfig, records: Records) -> Iterator[dict[str, Any]]:
    if study.searcher == "grid":
        return
    past = history(study, records)
    for attempt in range(MAX_DRAWS):
        # A seed for each draw: what is drawn depends on the records, not on how often the study was started.
        seed = zlib.crc32(f"{study.seed} {len(records)} {attempt}".encode())
        kinds = {"random": optuna.samplers.RandomSampler, "tpe": optuna.samplers.TPESampler}
        past.sampler = kinds[study.searcher](seed=seed)
        trial = past.ask()
        values: dict[str, Any] = {}
        for key in study.keys:
            domain = domain_of(study, key, values)
            if domain is not None:
                values[key] = _suggested(trial, key, domain)
        past.tell(trial, state=TrialState.FAIL)  # it is in the history once it is in the records
        yield values


def _grid(study: StudyConfig) -> Iterator[dict[str, Any]]:
    """What is left of a space without ranges."""
    if all(domain.values is not None for domains in study.space.values() for domain in domains):
        yield from combinations(study)


def history(study: StudyConfig, records: Records) -> optuna.Study:
    """The trials so far as Optuna's."""
    past = optuna.create_study(directions=[direction(study), *([StudyDirection.MINIMIZE] if study.cost else [])])
    past.add_trials([_frozen(study, record) for record in records])
    return past


def direction(study: StudyConfig) -> StudyDirection:
    return StudyDirection.MAXIMIZE if study.mode == "max" else StudyDirection.MINIMIZE


def _frozen(study: StudyConfig, record: Record) -> FrozenTrial:
    params, distributions = {}, {}
    for key, value in record.values.items():
        domain = domain_of(study, key, record.values)
        if domain is not None:
            params[_name(key, domain)] = label(value) if domain.choice is not None else value
            distributions[_name(key, domain)] = _distribution(domain)
    metric = record.metric(study)
    is_known = metric is not None and record.status in ("finished", "stopped")
    values = [metric or 0.0, *([record.cost] if study.cost else [])] if is_known else None
    reports = {} if study.cost else {int(r["step"]): r[study.metric] for r in record.reports}
    state = STATES[record.status] if is_known or record.status == "running" else TrialState.FAIL
    return create_trial(
        state=state, values=values, params=params, distributions=distributions, intermediate_values=reports
    )


def _suggested(trial: optuna.Trial, key: str, domain: Domain) -> Any:
    name, distribution = _name(key, domain), _distribution(domain)
    if isinstance(distribution, CategoricalDistribution):
        drawn = trial.suggest_categorical(name, distribution.choices)
        return next(value for value in domain.choice or [] if label(value) == drawn)
    if isinstance(distribution, IntDistribution):
        return trial.suggest_int(name, distribution.low, distribution.high, step=distribution.step)
    assert isinstance(distribution, FloatDistribution)
    drawn = trial.suggest_float(name, distribution.low, distribution.high, step=distribution.step, log=distribution.log)
    # Of a list its own value: 3 steps of 0.1 are 0.30000000000000004.
    return drawn if domain.values is None else min(domain.values, key=lambda value: abs(value - drawn))


def _distribution(domain: Domain) -> BaseDistribution:
    if domain.choice is not None:
        return CategoricalDistribution([label(v) for v in domain.choice])
    if domain.quniform is None:
        assert domain.bounds is not None
        return FloatDistribution(*domain.bounds, log=domain.loguniform is not None)
    first, last, step = (domain.values or [])[0], (domain.values or [])[-1], domain.quniform[2]
    if isinstance(first, int) and isinstance(step, int):
        return IntDistribution(first, last, step=step)
    return FloatDistribution(first, last, step=step)


def label(value: Any) -> str | int | float | bool | None:
    """A value as Optuna keeps it, which knows no lists."""
    return value if isinstance(value, str | int | float | bool | None) else json.dumps(value)


def _name(key: str, domain: Domain) -> str:
    """Optuna knows one domain by one name."""
    return f"{key} where {_condition(domain.when)}" if domain.when else key


def _condition(when: Mapping[str, Any]) -> str:
    return " and ".join(f"{key}={json.dumps(value)}" for key, value in when.items())
