"""What training starts from: a model that can be built, and the weights of an older one (`model.init_from`)."""

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from common import storage
from common.errors import ConfigError
from training import models, weights
from training.backbone import find
from training.config import TrainConfig
from training.models import Retriever

log = logging.getLogger(__name__)
HEADS = {"captioner", "temporal", "scorer"}  # what training may go on without


def check_model(config: TrainConfig) -> None:
    """Refuse, before any worker starts, a model that can't be built, or that its tokenizer or weights don't fit.

    Raises:
        ConfigError, RunError: with what is wrong.
    """
    models.tokenize(config.model)
    model, run = _without_values(config), config.model.init_from
    if run is None:
        return
    theirs = weights.load_config(run)
    if not storage.exists(weights.best_url(run)):
        raise weights.no_best(run)
    old = _without_values(theirs)
    is_same = find(config.model.backbone) == find(theirs.model.backbone)
    if not is_same or old.clip.visual.image_mean != model.clip.visual.image_mean:
        raise ConfigError(
            f"model.init_from={run} has model.backbone={theirs.model.backbone} and model.pretrained="
            f"{theirs.model.pretrained}, which say what its towers are: set both to these, or choose other weights"
        )
    _under_our_names(old.state_dict(), model, run)


def load_initial(config: TrainConfig, model: Retriever) -> None:
    """Load the weights of `model.init_from`, if it is set, into a new model.

    A component (the backbone, the cube, a head) that both have must be the same to the shape. One that only the model
    has begins as it would without; one that only the file has may be a head that the configuration does without.

    Raises:
        RunError, ConfigError: they can't be read, or don't fit.
    """
    run = config.model.init_from
    if run is None:
        return
    values = _under_our_names(weights.read_best(run)[0], model, run)
    new = {_component(name) for name in model.state_dict().keys() - values.keys()}
    model.load_state_dict(values, strict=False)
    log.info("starting from the weights of %s; new here: %s", run, ", ".join(sorted(new)) or "nothing")


def _without_values(config: TrainConfig) -> Retriever:
    with torch.device("meta"):
        return models.build(config.model, load=False)


def _under_our_names(theirs: Mapping[str, Tensor], model: Retriever, run: str) -> dict[str, Tensor]:
    """Their values by our parameters' names. Raises ConfigError naming those that don't fit."""
    ours = {_plain(name): value for name, value in model.state_dict().items()}
    found = {_plain(name): value for name, value in theirs.items()}
    both = {_component(n) for n in ours} & {_component(n) for n in found} | {"clip"}
    reasons = [
        f"{name} is {_shape(found, name)} there and {_shape(ours, name)} here"
        for name in sorted(ours.keys() | found.keys())
        if _component(name) in both and _shape(found, name) != _shape(ours, name)
    ]
    reasons = reasons[:3] + [f"{len(reasons) - 3} more"] * (len(reasons) > 3)
    reasons += [f"there is no {name} here" for name in sorted({_component(n) for n in found} - both - HEADS)]
    if reasons:
        raise ConfigError(f"model.init_from={run} does not fit the model: {'; '.join(reasons)}")
    return {name: found[_plain(name)] for name in model.state_dict() if _plain(name) in found}


def _plain(name: str) -> str:
    """A parameter's name without what a scorer puts before its towers'."""
    return name.removeprefix("towers.")


def _component(name: str) -> str:
    return _plain(name).split(".")[0]


def _shape(values: Mapping[str, Tensor], name: str) -> str:
    return str(list(values[name].shape)) if name in values else "absent"
