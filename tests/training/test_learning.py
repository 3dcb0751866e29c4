"""The benchmark of what methods learn: its loop is training's, its rows are runs that are trained once."""

from pathlib import Path

import pytest
import ray
import torch

from benchmarks import learning
from common import config as configs
from common.config import apply
from common.errors import ConfigError, RunError
from training import weights
from training.config import PRESETS, TrainConfig
from training.train import train, with_absolute_paths

SHORT = {"optim.steps": 3, "optim.batch_size": 8, "optim.warmup": 0, "eval.batch_size": 8, "workers.loader_workers": 0}


def base_of(dataset: str, folder: Path) -> TrainConfig:
    given = [f"data.dataset={dataset}", f"run.storage={folder}", f"data.cache={folder / 'cache'}"]
    return configs.load(TrainConfig, "moving_shapes", given, PRESETS)


def test_every_row_is_a_configuration_and_a_run_of_its_own(tmp_path: Path) -> None:
    base = base_of("nowhere", tmp_path)
    names = {apply(base, row.changes).model.name for row in learning.ROWS.values()}
    assert names == {"prompt_switch", "seq_transf", "token_shift", "clip_vip", "vop", "mean_pool", "ts2net"}
    assert len({learning.run_name(row, 0) for row in learning.ROWS}) == len(learning.ROWS)
    for row in learning.ROWS.values():
        assert bool(row.start) >= apply(base, row.changes).model.freeze_backbone
    assert learning.rows_of("ablation") == list(learning.ABLATION) and learning.rows_of("VoP") == ["VoP"]
    with pytest.raises(ConfigError, match=r"'VoQ' is none of mean pooling, .*, nor one of ablation, methods"):
        learning.rows_of(["VoP", "VoQ"])


def test_its_loop_is_that_of_training(tiny: TrainConfig) -> None:
    """Seen to fail without the step's learning rate, without the clipped gradient, and with another sample order."""
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    changes = {"workers.num_workers": 1, "eval.every": tiny.optim.steps, "optim.grad_clip": 0.1}
    config = with_absolute_paths(apply(tiny, changes))
    scores = train(config)
    _, theirs = weights.load_run(weights.run_url(config))
    model = learning.trained(config, None)
    assert {**learning.tested(config, model), "best_step": config.optim.steps} == pytest.approx(scores)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-5, atol=1e-6, msg=name)


def test_a_frozen_row_starts_from_mean_pooling_of_its_seed(shapes: str, tmp_path: Path) -> None:
    """Seen to fail with random towers."""
    base = base_of(shapes, tmp_path)
    learning.result(base, "VoP", 1, SHORT)
    (_, first), (_, vop) = (weights.load_run(str(tmp_path / name)) for name in ("mean-pooling-1", "vop-1"))
    assert all(torch.equal(value, vop.clip.state_dict()[name]) for name, value in first.clip.state_dict().items())


def test_a_finished_row_is_read(shapes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of a dataset without twins, which has no order score."""
    base = apply(base_of(shapes, tmp_path), {"eval.twins": False})
    scores = learning.result(base, "mean pooling", 0, SHORT)
    assert scores["num_videos"] == 8 and "order" not in scores
    monkeypatch.setattr(learning, "trained", lambda *_: pytest.fail("trained again"))
    assert learning.result(base, "mean pooling", 0, SHORT) == scores
    with pytest.raises(RunError, match=r"optim\.steps was 3, is 4"):
        learning.result(base, "mean pooling", 0, {**SHORT, "optim.steps": 4})


def test_the_table_has_intervals_over_seeds() -> None:
    """By hand: 1, 2 and 6 have mean 3 and s = sqrt(7), so t(2) * s / sqrt(3) = 4.303 * 1.5275 = 6.57."""
    scores = {seed: {"r1": r1, "r5": 50.0, "num_videos": 8.0} for seed, r1 in ((0, 1.0), (1, 2.0), (2, 6.0))}
    lines = learning.table({("VoP", seed): of_seed for seed, of_seed in scores.items()}, ["VoP"], [0, 1, 2])
    assert lines.splitlines()[2:] == ["| VoP | 3.0 ± 6.6 | 50.0 ± 0.0 |", "| chance | 12.5 | 62.5 |"]
    assert learning.interval([4.0], ".1f") == "4.0"
