"""A run that was ended anywhere goes on with the batches that are left, on any number of ranks."""

import io
import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import pytest
import ray
import torch
from ray.train import UserCallback

from common import storage
from common.config import apply
from common.errors import RunError
from tests.training import samples
from tests.training.conftest import tiny_config
from training.config import TrainConfig
from training.train import train
from training.weights import load_run, run_url


@pytest.fixture(autouse=True)
def driver(ray_local: object) -> None:
    ray.init(ignore_reinit_error=True, log_to_driver=False)


def logging_samples(config: TrainConfig, folder: Path) -> TrainConfig:
    """Eight steps with random crops, a checkpoint every two, and a log of all video ids."""
    draws = {"data.crop_scale": [0.5, 1.0], "data.flip": True}
    return apply(config, {"optim.steps": 8, "tracking.samples": str(folder / "samples"), "eval.every": 8, **draws})


@pytest.fixture
def logged(tiny: TrainConfig, tmp_path: Path) -> TrainConfig:
    return logging_samples(tiny, tmp_path)


class Whole(NamedTuple):
    """A run that nothing happened to: what the others must end as."""

    config: TrainConfig
    result: dict[str, float]


@pytest.fixture(scope="module")
def whole(shapes: str, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    folder = tmp_path_factory.mktemp("whole")
    config = logging_samples(tiny_config(shapes, f"s3://tests/{folder.name}-{os.urandom(4).hex()}", folder), folder)
    return Whole(config, train(config))


class DieAtAReport(UserCallback):
    """Ends the process that steers the run, as the loss of its node would, once so many checkpoints are committed."""

    def __init__(self, count: int = 1) -> None:
        self.left = count

    def after_report(self, run_context: object, metrics: object, checkpoint: object) -> None:
        self.left -= 1
        if not self.left:
            os._exit(1)


def metric(config: TrainConfig, name: str) -> dict[int, float]:
    record = json.loads(storage.read(storage.join(run_url(config), "mlflow_run.json")))
    history = mlflow.MlflowClient(config.tracking.uri).get_metric_history(record["run_id"], name)
    values = {m.step: m.value for m in history}
    assert len(values) == len(history), "a step twice"
    return values


def another(config: TrainConfig, name: str) -> TrainConfig:
    folder = Path(config.tracking.samples or "").parent / name
    return apply(config, {"run.name": name, "tracking.samples": str(folder)})


def test_a_killed_worker_loses_no_sample_and_repeats_none_that_counts(logged: TrainConfig, whole: Whole):
    """Without `start=position.step` the first batches come again; without restore() the losses differ."""
    folder = Path(logged.tracking.samples or "")
    samples.when(lambda: samples.reached(folder) >= 5, lambda: samples.kill_a_worker(folder))
    assert train(logged) == whole.result
    first, *_, last = samples.starts(folder)
    assert min(first.steps) == 0 and 0 < min(last.steps) <= 6 and max(last.steps) == 7
    assert samples.effective(folder) == samples.planned(logged)
    assert metric(logged, "train/loss") == metric(whole.config, "train/loss")  # to the bit
    (reference,) = samples.starts(Path(whole.config.tracking.samples or ""))
    assert reference.steps == samples.planned(logged)
    captions: dict[int, set[str]] = {}  # their turns, too; the killed rank may not have noted its last step
    for start in samples.starts(folder):
        captions.update(start.captions)
    assert captions == reference.captions
    lost = metric(logged, "train/lost_steps")
    assert list(lost) == [min(last.steps)] and 0 <= lost[min(last.steps)] <= 2 + 1


@pytest.mark.slow
def test_a_stopped_run_goes_on_where_its_checkpoint_is_and_ends_the_same(logged: TrainConfig, whole: Whole):
    """Ended with its driver's part of Ray, which alone knows the checkpoints: the same command finds them.

    Seen to fail where the list of checkpoints is not asked for.
    """
    with pytest.raises(ray.exceptions.ActorDiedError):
        train(logged, callbacks=[DieAtAReport()])
    assert train(logged) == whole.result
    assert min(samples.starts(Path(logged.tracking.samples or ""))[-1].steps) >= 2
    assert metric(logged, "train/loss") == metric(whole.config, "train/loss")  # the same to the bit
    assert best_weights(logged) == best_weights(whole.config)


def test_the_number_of_ranks_does_not_change_the_training(logged: TrainConfig, whole: Whole):
    """Three ranks, which do not divide the eight lanes, and two.

    Seen to fail where each rank is thought to have an equal share of the batch.
    """
    train(apply(logged, {"workers.num_workers": 3}))
    assert metric(logged, "train/loss") == pytest.approx(metric(whole.config, "train/loss"), rel=1e-4)


@pytest.mark.slow
def test_a_run_goes_on_at_any_number_of_ranks(logged: TrainConfig, whole: Whole):
    """4 → 3 → 2 → 1 ranks, one checkpoint each. Three do not divide the eight lanes.

    Seen to fail where a start reads the samples from the first step on.
    """
    for ranks in (4, 3, 2):
        with pytest.raises(ray.exceptions.ActorDiedError):
            train(apply(logged, {"workers.num_workers": ranks}), callbacks=[DieAtAReport()])
    train(apply(logged, {"workers.num_workers": 1}))
    folder = Path(logged.tracking.samples or "")
    assert [len(start.pids) for start in samples.starts(folder)] == [4, 3, 2, 1]
    assert samples.effective(folder) == samples.planned(logged)
    losses, reference = metric(logged, "train/loss"), metric(whole.config, "train/loss")
    assert losses == pytest.approx(reference, rel=1e-4)


@pytest.mark.slow
def test_chunks_change_nothing_but_the_memory(logged: TrainConfig, whole: Whole):
    train(apply(logged, {"workers.chunk_size": 2}))
    assert metric(logged, "train/loss") == pytest.approx(metric(whole.config, "train/loss"), rel=1e-4)


def best_weights(config: TrainConfig) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in load_run(run_url(config))[1].state_dict().items()}


def last_state(config: TrainConfig) -> dict[str, Any]:
    urls = [e.url for e in storage.list_files(run_url(config)) if e.url.endswith("/state.pt")]
    state: dict[str, Any] = torch.load(io.BytesIO(storage.read(max(urls))), weights_only=True)
    return state


@pytest.mark.slow
def test_a_moving_average_is_what_is_kept_and_it_survives(logged: TrainConfig):
    """As does dropout. Seen to fail without the seed of each step, and without the average in the checkpoint."""
    changes = {"optim.ema": 0.5, "optim.steps": 4, "model.captioner.dropout": 0.3}
    averaged, parts = apply(another(logged, "averaged"), changes), apply(another(logged, "parts"), changes)
    train(averaged)
    with pytest.raises(ray.exceptions.ActorDiedError):
        train(parts, callbacks=[DieAtAReport()])
    train(parts)
    expected = best_weights(averaged)
    assert all(value == expected[name] for name, value in best_weights(parts).items())
    assert any(value.numpy().tobytes() != expected[name] for name, value in last_state(averaged)["model"].items())


def damage(config: TrainConfig, how: str, newest: int) -> None:
    """The states of the newest checkpoints that Ray lists; one that is just being uploaded is not among them."""
    snapshot = storage.read(storage.join(run_url(config), "checkpoint_manager_snapshot.json")).decode()
    listed = sorted(set(re.findall(r"checkpoint_\d{4}[-_.\d]*\d", snapshot)))
    assert len(listed) == 2, snapshot
    for name in listed[-newest:]:
        url = storage.join(run_url(config), name, "state.pt")
        data = bytearray(storage.read(url))
        data[len(data) // 2] ^= 1
        storage.publish_bytes(bytes(data[:-1000] if how == "cut" else data), url)


def stop_at_its_second_checkpoint(config: TrainConfig) -> None:
    with pytest.raises(ray.exceptions.ActorDiedError):
        train(config, callbacks=[DieAtAReport(2)])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["flip", "cut"])
def test_a_damaged_newest_checkpoint_is_skipped_for_the_one_before(logged: TrainConfig, whole: Whole, how: str):
    """Without the checksum the flipped one is loaded and the losses differ; without the loop the cut one ends it."""
    stop_at_its_second_checkpoint(logged)
    damage(logged, how, newest=1)
    assert train(logged) == whole.result
    folder = Path(logged.tracking.samples or "")
    assert min(samples.starts(folder)[-1].steps) == 2  # not 4
    assert samples.effective(folder) == samples.planned(logged)


@pytest.mark.slow
def test_only_damaged_checkpoints_are_one_sentence(logged: TrainConfig):
    """Seen to fail where a run without a whole checkpoint begins anew."""
    stop_at_its_second_checkpoint(logged)
    damage(logged, "flip", newest=2)
    with pytest.raises(RunError, match=r"all 2 checkpoints are damaged: choose a new run.name"):
        train(logged)


def test_a_checkpoint_is_plain_data(whole: Whole):
    """Seen to fail with the configuration, an object of ours, in it."""
    state = last_state(whole.config)
    assert set(state) == {"model", "optimizer", "step", "best"} and state["step"] == 8


def test_a_loss_that_is_not_a_number_ends_the_run_before_it_is_saved(logged: TrainConfig):
    """Also where the log comes more rarely than the checkpoint: seen to fail where only what is logged is looked at."""
    config = apply(logged, {"optim.lr": 1e30, "optim.lr_new": 1e30, "optim.warmup": 0, "tracking.log_every": 100})
    with pytest.raises(RunError, match=r"the loss is nan at step \d .*lower optim.lr"):
        train(config)
    assert not [e for e in storage.list_files(run_url(config)) if e.url.endswith("/state.pt")]
