"""A wrong study is refused in one sentence, before Ray or any trial."""

import json
import subprocess
import sys
from typing import Any

import pytest

from common import config as configs
from common.errors import ConfigError
from training import models
from tuning.config import STUDIES, StudyConfig
from tuning.space import combinations, resolve, trial_config


def study(*overrides: str) -> StudyConfig:
    return configs.load(StudyConfig, "tiny", overrides, STUDIES)


FRAMES = '"model.num_frames": {"choice": [6, 12]}'


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ('space={"model.num_promts": {"choice": [2]}}', r"space: unknown key 'model.num_promts'.*'model.num_prompts'"),
        (
            'space={"model.num_prompts": {"choice": [6, 5]}}',
            r"model.num_frames=6 is no multiple of model.num_prompts=5",
        ),
        # Each value fits the base or another one, not all of them.
        (
            f'space={{{FRAMES}, "model.num_prompts": {{"choice": [2, 12]}}}}',
            r"model.num_frames=6 is no multiple of model.num_prompts=12; give model.num_prompts a list .* with `when",
        ),
        ('space={"optim.lr": {"uniform": [-1, 1]}}', r"space: optim.lr=-1.0"),
        ('space={"losses.frequent_weight": {"uniform": [0.5, 2]}}', r"space: losses.frequent_weight=2.0"),
        ('space={"optim.steps": {"uniform": [2, 8]}}', r"optim.steps=.*integer.*use choice"),
        ('space={"optim.steps": {"quniform": [2, 8, 0.5]}}', r"optim.steps=2.5.*integer"),
        ('space={"optim.lr": {"choice": [1e-3], "uniform": [0, 1]}}', r"space.optim.lr.*choice and uniform"),
        ('space={"optim.lr": {"loguniform": [0, 1]}}', r"needs low > 0"),
        ('space={"optim.lr": {"uniform": [1, 0]}}', r"is no range"),
        ('space={"optim.lr": {"quniform": [0, 1, 1e-6]}}', r"more than 1000 values"),
        ('space={"optim.lr": {"normal": [1, 0]}}', r"normal"),
        ('space={"run.name": {"choice": ["x"]}}', r"run.name is set by the study"),
        ('space={"seed": {"choice": [1], "when": {"optim.lr": 1}}}', r"`when` names optim.lr, which is not in the"),
        (
            f'space={{{FRAMES}, "seed": {{"choice": [1], "when": {{"model.num_frames": 8}}}}}}',
            r"waits for model.num_frames=8, which is never drawn",
        ),
        (
            f'space={{{FRAMES}, "seed": [{{"choice": [1]}}, {{"choice": [2], "when": {{"model.num_frames": 6}}}}]}}',
            r"only the last of its domains may be without",
        ),
        (
            'space={"seed": {"choice": [1], "when": {"optim.steps": 4}}, '
            '"optim.steps": {"choice": [4], "when": {"seed": 1}}}',
            r"depend on each other in a circle: ",
        ),
        ("overrides.optim.step=3", r"unknown key 'optim.step'.*'optim.steps'"),
        ("overrides.losses.caption=0.1", r"losses.caption is both in overrides and in space"),
        ("overrides.checkpoint.every=3", r"checkpoint.every=3 is no multiple of eval.every=2"),
        ("overrides.data.val=null", r"data.val is null"),
        ('space={"data.val": {"choice": ["val", null]}}', r"space: data.val is null"),
        ("overrides.optim.steps=0", r"optim.steps=0 trains nothing"),
        ('space={"eval.every": {"choice": [1, 2]}}', r"compared by their evaluations, so eval.every is one for all"),
        ("metric=test_r1", r"test split must not choose"),
        ("metric=r2", r"metric=r2 is not one of r1"),
        ("metric=order", r"eval.twins=true"),
        ("mode=min", r"mode=min looks for the worst rsum"),
        ("base=tinny", r"unknown preset 'tinny', did you mean 'tiny'"),
        ('space={"workers.num_workers": {"choice": [1, 2]}}', r"trials share the cluster by workers.num_workers"),
        ("overrides.workers.gpus_per_worker=0.5", r"workers.gpus_per_worker=0.5 needs workers.num_workers=1"),
        ("searcher=grid", r"searcher=grid cannot list model.cube_init_std"),
        ("trials=null", r"trials is required with searcher=random"),
    ],
)
def test_refused(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        resolve(study(override))


def test_two_objectives_are_not_stopped_by_one() -> None:
    with pytest.raises(ConfigError, match="scheduler=asha compares by metric alone"):
        study("cost=images", "scheduler=asha")


def test_when_gives_only_what_fits() -> None:
    s = study(
        f'space={{{FRAMES}, "model.num_prompts": [{{"choice": [4, 12], "when": {{"model.num_frames": 12}}}}, '
        '{"quniform": [1, 3, 1]}], "model.cube_layers": {"choice": [[0, 1]], "when": {"model.num_prompts": [1, 4]}}}'
    )
    resolve(s)
    found = [tuple(values.values()) for values in combinations(s)]
    assert found == [(6, 1, [0, 1]), (6, 2), (6, 3), (12, 4, [0, 1]), (12, 12)]
    assert all(type(prompts) is int for _, prompts, *_ in found)


def test_a_large_space_is_checked_by_pairs() -> None:
    """Seen to fail where only the first combinations were tried: they all have the first value of this key."""
    keys = ("lr", "lr_new", "eps", "warmup", "grad_clip")
    many = {f"optim.{key}": {"choice": [0.001 * i for i in range(1, 9)]} for key in keys}
    frames = {"model.num_frames": {"choice": [12, 6]}, "model.num_prompts": {"choice": [6, 12]}}
    with pytest.raises(ConfigError, match=r"num_frames=6 is no multiple of model.num_prompts=12"):
        resolve(study(f"space={json.dumps({**frames, **many})}"))
    resolve(study(f"space={json.dumps(many)}"))


@pytest.mark.parametrize("name", configs.preset_names(STUDIES))
def test_shipped_studies_can_be_built(name: str) -> None:
    """What a configuration alone does not tell: that the backbone has such layers and so many places for prompts."""
    s = configs.load(StudyConfig, name, (), STUDIES)
    base = resolve(s)
    drawn = list(combinations(s, lambda key, domain: domain.values or list(domain.bounds or ())))
    for values in drawn[:: max(1, len(drawn) // (2 if "ViT" in base.model.backbone else 30))]:
        config = configs.apply(trial_config(s, base, values), {"model.pretrained": None})
        models.build(config.model)


def test_check_needs_no_ray() -> None:
    heavy = "{'ray', 'torch', 'mlflow', 'optuna'}"
    code = f"import sys, tuning.space, tuning.promote; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_report_holds_the_metric() -> None:
    s = study("overrides.eval.every=3", "metric=mnr", "mode=min")
    config = trial_config(s, resolve(s), {})
    assert config.checkpoint.every == config.eval.every == 3
    assert config.eval.select == "mnr"


def test_overrides_are_flat_or_nested() -> None:
    nested: dict[str, Any] = study("overrides.data.dataset=x", "overrides.optim.steps=3").overrides
    assert nested == {"data.dataset": "x", "optim.steps": 3}
    whole = study('overrides={"model.captioner": {"layers": 3}}')
    assert resolve(whole).model.captioner is not None
