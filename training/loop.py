"""The training loop: what every rank does, from seed to test metrics. One page, read top to bottom.

Decisions depend on the step number only, so every rank makes the same ones.
"""

import functools
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from common import logs, retry, shards
from common.errors import RunError
from training import checkpoint, losses, models, optim, weights
from training.collectives import sum_over_ranks
from training.config import LOWER_IS_BETTER, TrainConfig
from training.data.loader import Batch, EvalBatch, eval_loader, open_cache, sample_order, train_loader
from training.encode import evaluate
from training.models.tokenizer import frequent_ids
from training.monitor import Monitor
from training.start import load_initial
from training.step import accumulate

log = logging.getLogger(__name__)
MAX_LOGIT_SCALE = 100.0


def train_loop(settings: dict[str, Any]) -> dict[str, float]:
    """Train, select on validation, and return the test metrics of the best weights.

    Args:
        settings: {"config": TrainConfig as plain data, "metric_log": handle of tracking.MetricLog or None}.
    """
    config = TrainConfig.model_validate(settings["config"])
    began, began_at = time.monotonic(), time.time()
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    logs.setup(rank)
    device = ray.train.torch.get_device()
    torch.set_num_threads(config.workers.threads)
    torch.manual_seed(config.seed)
    run = weights.run_url(config)

    model = models.build(config.model)
    load_initial(config, model)
    if config.losses.temperature is not None:
        model.clip.logit_scale.data.fill_(-math.log(config.losses.temperature))
    model.to(device)
    # No buffer changes in training, and ranks may run different numbers of forward passes.
    ddp = DistributedDataParallel(
        model.towers,
        forward_sync_buffers=False,
        gradient_as_bucket_view=True,
        find_unused_parameters=not config.losses.reads_text,
    )
    state = checkpoint.State(model, optim.build(model, config.optim), optim.average(model, config.optim))
    if config.workers.checkpoint_activations:
        model.clip.set_grad_checkpointing()
    if config.workers.compile:
        model.compile_towers()
    tokenize = models.tokenize(config.model)
    weights_V = token_weights(config, model).to(device)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=use_bf16(config, device))
    position = checkpoint.restore(config, state)

    dataset, dataset_sha256 = retry.again(lambda: shards.read_dataset(config.data.dataset))
    cache = open_cache(config, dataset_sha256)
    counts = sample_order(config, dataset).counts(world_size)
    loader = train_loader(config, dataset, cache, position.step, rank, world_size)
    val = eval_loader(config, dataset, cache, config.data.val, rank, world_size) if config.data.val else None
    meter = Meter(config, rank, position.step, settings["metric_log"])
    samples = SampleLog(config.tracking.samples, rank)

    for step, batch in enumerate(meter.timed(loader), start=position.step):
        samples.write(step, batch)
        torch.manual_seed(optim.seed_of(config.seed, step))  # a restart meets the same dropout
        optim.set_lr(state.optimizer, config.optim, step)
        state.optimizer.zero_grad()
        frames = batch.frames_BFCHW.to(device, non_blocking=True)
        chunk_size = config.workers.chunk_size
        parts = accumulate(ddp, frames, batch.tokens_BL, config.losses, weights_V, counts, chunk_size, autocast, model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.grad_clip)
        state.optimizer.step()
        model.clip.logit_scale.data.clamp_(max=torch.tensor(MAX_LOGIT_SCALE).log().item())
        if state.ema is not None:
            state.ema.update_parameters(model)
        done = step + 1
        meter.done(done)
        last = done == config.optim.steps
        is_draining = done % config.workers.drain_every == 0 and checkpoint.is_draining()
        is_saved = done % config.checkpoint.every == 0 or last or is_draining

        # What is saved has been seen to be finite.
        if done % config.tracking.log_every == 0 or is_saved:
            meter.log(done, parts, model.clip.logit_scale.exp())
        scores: dict[str, float] = {}
        if val is not None and (done % config.eval.every == 0 or last):
            scores = evaluate(state.best, meter.paused(val), tokenize, config.eval, device)
            meter.log_scores("val", done, scores)
            score, sign = scores[config.eval.select], -1 if config.eval.select in LOWER_IS_BETTER else 1
            if position.best is None or sign * score > sign * position.best:
                position = position._replace(best=score)
                if rank == 0:
                    weights.save_best(run, state.best, done, scores)
        position = position._replace(step=done)
        reported = {"step": done, "loop_began": began_at, "loop_s": time.monotonic() - began, **scores}
        if is_saved:
            in_background = not (last or is_draining)
            checkpoint.report(config, state, position, reported, in_background)
        elif scores:
            ray.train.report(reported)

    if rank == 0 and position.best is None:  # no validation split, or no step to take
        weights.save_best(run, state.best, position.step, {})
    return test_metrics(config, model, run, device, settings["metric_log"])


def test_metrics(config: TrainConfig, model: models.Retriever, run: str, device: torch.device, metric_log: Any) -> dict:
    """Metrics of the best weights on the test split, measured once; on the validation split if there is no test."""
    rank, world_size = ray.train.get_context().get_world_rank(), ray.train.get_context().get_world_size()
    sum_over_ranks(torch.zeros(1, device=device))  # rank 0 has published best/ before anybody reads it
    header = weights.load_best(run, model)
    split = config.data.test or config.data.val
    assert split is not None
    dataset, dataset_sha256 = retry.again(lambda: shards.read_dataset(config.data.dataset))
    batches = eval_loader(config, dataset, open_cache(config, dataset_sha256), split, rank, world_size)
    scores = evaluate(model, batches, models.tokenize(config.model), config.eval, device)
    if rank == 0:
        log.info("%s: %s", split, show(scores))
        if metric_log is not None:
            metric_log.log.remote({f"test/{k}": v for k, v in scores.items()}, header["step"])
    return {**scores, "best_step": header["step"]}


def use_bf16(config: TrainConfig, device: torch.device) -> bool:
    return config.workers.bf16 and device.type == "cuda" and torch.cuda.is_bf16_supported()


def token_weights(config: TrainConfig, model: models.Retriever) -> Tensor:
    """Class weights of the caption loss, V."""
    frequent = frequent_ids(config.model.backbone, losses.FREQUENT_WORDS) if config.losses.caption else []
    return losses.token_weights(model.clip.vocab_size, frequent, config.losses.frequent_weight)


def show(scores: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.3g}" for name, value in scores.items() if "v2t_" not in name)


class SampleLog:
    """The video ids of every step of one rank, a line each, in a file per start: proves what was trained on."""

    def __init__(self, folder: str | None, rank: int) -> None:
        self.file = None
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.file = open(Path(folder) / f"{time.time_ns()}-{os.getpid()}-{rank}.jsonl", "w", buffering=1)  # noqa: SIM115

    def write(self, step: int, batch: Batch) -> None:
        if self.file is not None:
            self.file.write(json.dumps({"step": step, "videos": batch.video_ids, "captions": batch.caption_ids}) + "\n")


class Meter:
    """Throughput, share of time waiting for data, time left, and the metric log of rank 0."""

    def __init__(self, config: TrainConfig, rank: int, start_step: int, metric_log: Any) -> None:
        self.config, self.rank, self.metric_log = config, rank, metric_log
        self.monitor = Monitor(weights.run_url(config))
        self.last_step, self.last_time = start_step, time.monotonic()
        self.waited = self.input_cpu_s = 0.0
        if rank == 0 and metric_log is not None:
            lost = ray.get(metric_log.lost_since.remote(start_step))
            if start_step or lost:
                log.info("going on at step %d; %d steps done after it are lost", start_step, lost)
                metric_log.log.remote({"train/lost_steps": lost}, start_step)

    def done(self, step: int) -> None:
        if self.rank == 0 and self.metric_log is not None:
            self.metric_log.reach.remote(step)

    def timed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; the time until each arrives counts as waiting."""
        iterator = iter(batches)
        while True:
            start = time.monotonic()
            batch = next(iterator, None)
            self.waited += time.monotonic() - start
            if batch is None:
                return
            self.input_cpu_s += batch.cpu_s
            yield batch

    def paused(self, batches: Iterable[EvalBatch]) -> Iterator[EvalBatch]:
        """The batches of an evaluation; its time counts neither as work nor as waiting."""
        start = time.monotonic()
        yield from batches
        self.last_time += time.monotonic() - start

    def log(self, step: int, parts: dict[str, Tensor], logit_scale: Tensor) -> None:
        """One line on rank 0: global losses, samples/s, waiting, ETA. A collective. Raises RunError on a NaN loss."""
        values = sum_over_ranks(torch.stack(list(parts.values()))).tolist()
        terms = dict(zip(parts, values, strict=True))
        total = sum(values)
        if not total < float("inf"):
            raise RunError(f"the loss is {total} at step {step} ({terms}): lower optim.lr")
        elapsed = max(time.monotonic() - self.last_time, 1e-9)
        rate = (step - self.last_step) / elapsed
        pace = {
            "loss": total,
            "samples_per_s": rate * self.config.optim.batch_size,
            "step_s": 1 / rate,
            "data_wait": min(self.waited / elapsed, 1.0),
            # What would decode as fast as the step consumes when it never waits.
            "cores_needed": self.input_cpu_s / max(elapsed - self.waited, 1e-9),
        }
        self.last_step, self.last_time = step, time.monotonic()
        self.waited = self.input_cpu_s = 0.0
        self.monitor.count()
        if self.rank != 0:
            return
        self.monitor.show(pace)
        log.info(
            "step %d/%d  loss %.4f  %s  %.0f samples/s  data wait %.0f%%, needs %.1f cores a rank  %s left",
            *(step, self.config.optim.steps, total, "  ".join(f"{n} {v:.4f}" for n, v in terms.items())),
            *(pace["samples_per_s"], 100 * pace["data_wait"], pace["cores_needed"]),
            logs.duration((self.config.optim.steps - step) / rate),
        )
        if self.metric_log is not None:
            metrics = {f"train/{name}": value for name, value in {**terms, **pace}.items()}
            metrics["train/logit_scale"] = float(logit_scale.detach())
            self.metric_log.log.remote(metrics, step)

    def log_scores(self, split: str, step: int, scores: dict[str, float]) -> None:
        if self.rank == 0:
            log.info("step %d  %s: %s", step, split, show(scores))
            if self.metric_log is not None:
                self.metric_log.log.remote({f"{split}/{k}": v for k, v in scores.items()}, step)
