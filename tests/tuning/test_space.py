"""A wrong study is refused in one sentence, before Ray or any trial."""

import subprocess
import sys
from typing import Any

import pytest

from common import config as configs
from common.errors import ConfigError
from tuning.config import STUDIES, StudyConfig
from tuning.space import plain, resolve, trial_config


def study(*overrides: str) -> StudyConfig:
    return configs.load(StudyConfig, "tiny", overrides, STUDIES)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ('space={"model.num_promts": {"choice": [2]}}', r"space: unknown key 'model.num_promts'.*'model.num_prompts'"),
        (
            'space={"model.num_prompts": {"choice": [6, 5]}}',
            r"model.num_frames=6 is no multiple of model.num_prompts=5",
        ),
        ('space={"optim.lr": {"uniform": [-1, 1]}}', r"space: optim.lr=-1.0"),
        ('space={"losses.frequent_weight": {"uniform": [0.5, 2]}}', r"space: losses.frequent_weight=2.0"),
        ('space={"optim.steps": {"uniform": [2, 8]}}', r"optim.steps=.*integer.*use choice"),
        ('space={"optim.lr": {"choice": [1e-3], "uniform": [0, 1]}}', r"space.optim.lr.*choice and uniform"),
        ('space={"optim.lr": {"loguniform": [0, 1]}}', r"needs low > 0"),
        ('space={"optim.lr": {"uniform": [1, 0]}}', r"is no range"),
        ('space={"optim.lr": {"normal": [1, 0]}}', r"normal"),
        ('space={"run.name": {"choice": ["x"]}}', r"run.name is set by the study"),
        ("overrides.optim.step=3", r"unknown key 'optim.step'.*'optim.steps'"),
        ("overrides.losses.caption=0.1", r"losses.caption is both in overrides and in space"),
        ("overrides.checkpoint.every=3", r"checkpoint.every=3 is no multiple of eval.every=2"),
        ("overrides.data.val=null", r"data.val is null"),
        ("metric=test_r1", r"test split must not choose"),
        ("metric=r2", r"metric=r2 is not one of r1"),
        ("metric=order", r"eval.twins=true"),
        ("mode=min", r"mode=min looks for the worst rsum"),
        ("base=tinny", r"unknown preset 'tinny', did you mean 'tiny'"),
    ],
)
def test_refused(override: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        resolve(study(override))


@pytest.mark.parametrize("name", configs.preset_names(STUDIES))
def test_shipped_studies_resolve(name: str) -> None:
    resolve(configs.load(StudyConfig, name, (), STUDIES))


def test_check_needs_no_ray() -> None:
    code = "import sys, tuning.space, tuning.promote; assert not {'ray', 'torch', 'mlflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_report_holds_the_metric() -> None:
    s = study("overrides.eval.every=1", "metric=r5")
    config = trial_config(s, resolve(s), {"eval.every": 3})
    assert config.checkpoint.every == config.eval.every == 3
    assert config.eval.select == "r5"


def test_overrides_are_flat_or_nested() -> None:
    nested: dict[str, Any] = study("overrides.data.dataset=x", "overrides.optim.steps=3").overrides
    assert nested == {"data.dataset": "x", "optim.steps": 3}
    whole = study('overrides={"model.captioner": {"layers": 3}}')
    assert resolve(whole).model.captioner is not None


def test_numpy_values_become_plain() -> None:
    numpy = pytest.importorskip("numpy")
    assert type(plain(numpy.int64(3))) is int
    assert plain("x") == "x"
