"""What a second rank brings, what the ranks say to each other, and what that means for many GPUs.

    python -m benchmarks.scaling [key=value ...]

one rank    whole training steps on one core
two ranks   the same under DDP, as many clips on each of two cores
two apart   two such processes that know nothing of each other: what the cores give at most

The bytes are those that left through the loopback device during the steps; the theory beside them is a ring's:

    sent by all ranks = 2 (W - 1) G  +  2 [ W (W - 1) + 2 (W - 1) W ] b D 4 bytes

for W ranks, gradients of G bytes, and b texts and b videos of D numbers a rank: DDP's sum of the gradients, and for
texts and videos each the gathered vectors and the sum of their gradients.

The projection is arithmetic, not a measurement. For n nodes of g GPUs, c clips a GPU:

    compute   = operations of a clip (of its image tower alone) x c / (mfu x peak)
    exchange  = max(2 (n - 1)/n G / network of a node, 2 (g - 1)/g G / link between a node's GPUs)
    step      = compute + max(0, exchange - 2/3 compute)       the backward pass hides what it can

Rounds are kept in folder/rounds.jsonl.
"""

import functools
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pydantic import Field, PositiveFloat, PositiveInt

from benchmarks import rounds
from benchmarks.rounds import Times
from benchmarks.step import StepBenchConfig, model_of, operations, sides_of
from common.config import Settings
from common.errors import exit_with
from training.models import clip

NETWORKS_GBIT = (25, 100, 400, 3200)  # of one node


class ScalingBenchConfig(Settings):
    """What is measured, and the cluster of the projection."""

    folder: str = Field("data/bench-scaling", description="local folder of the results")
    rounds: PositiveInt = Field(7, description="paired rounds")
    minutes: PositiveFloat = Field(9.0, description="no round begins that would end later; run again to go on")
    backbone: str = Field("ViT-B-32", description="open_clip model name; its weights are random")
    clips: PositiveInt = Field(1, description="clips in a rank's batch")
    frames: PositiveInt = Field(6, description="frames of a clip")
    steps: PositiveInt = Field(2, description="steps of a round")
    nodes: PositiveInt = Field(8, description="projection: nodes")
    gpus: PositiveInt = Field(8, description="projection: GPUs of a node")
    gpu_clips: PositiveInt = Field(128, description="projection: clips a GPU and step")
    gpu_frames: PositiveInt = Field(12, description="projection: frames of a clip")
    peak_tflops: PositiveFloat = Field(989.0, description="projection: a GPU's peak, an H100's in bf16")
    mfu: PositiveFloat = Field(0.45, description="projection: share of the peak that is reached")
    link_gb_s: PositiveFloat = Field(370.0, description="projection: GB/s between a node's GPUs, NVLink 4 with NCCL")


def rank_main(index: int, config: ScalingBenchConfig, world_size: int, folder: str) -> None:
    """A process of one side: writes its seconds, and the bytes that left the machine's loopback meanwhile."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Ranks of one group share a store; processes that are apart have one each.
    store = dist.FileStore(f"{folder}/store-{index if world_size == 1 else 'all'}", world_size)
    dist.init_process_group("gloo", store=store, rank=index % world_size, world_size=world_size)
    step = sides_of(step_config(config), torch.device("cpu"))["whole step"]
    step()
    meet(Path(folder), index)
    sent, start = sent_bytes(), time.monotonic()
    for _ in range(config.steps):
        step()
    elapsed = time.monotonic() - start
    (Path(folder) / f"times-{index}").write_text(f"{elapsed} {sent_bytes() - sent}")
    dist.barrier()
    os._exit(0)  # torn down in Python, DDP and gloo may wait for each other (tests/training/test_gradients.py)


def meet(folder: Path, index: int) -> None:
    """Both processes of a side go on from here together, also those of no common group."""
    (folder / f"ready-{index}").touch()
    while len(list(folder.glob("ready-*"))) < int((folder / "processes").read_text()):
        time.sleep(0.005)


def sent_bytes() -> int:
    (line,) = [line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:")]
    return int(line.split(":")[1].split()[8])


def side(config: ScalingBenchConfig, processes: int, world_size: int) -> Times:
    """Seconds of the slowest process, and the bytes of a step."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "processes").write_text(str(processes))
        mp.spawn(rank_main, (config, world_size, folder), nprocs=processes)
        found = [(Path(folder) / f"times-{i}").read_text().split() for i in range(processes)]
    return {"tasks": max(float(s) for s, _ in found), "bytes": max(float(b) for _, b in found) / config.steps}


def theory(gradients: int, width: int, clips: int, world_size: int) -> int:
    """Bytes that all ranks send in a step; see above."""
    w = world_size
    return 2 * (w - 1) * gradients + 2 * (w * (w - 1) + 2 * (w - 1) * w) * clips * width * 4


def projection(config: ScalingBenchConfig, gradients: int, operations: float) -> list[str]:
    """A line for each network: seconds and the share of the time that is not spent waiting for it."""
    compute = operations * config.gpu_clips / (config.mfu * config.peak_tflops * 1e12)
    inside = 2 * (config.gpus - 1) / config.gpus * gradients / (config.link_gb_s * 1e9)
    lines = [f"{config.nodes} x {config.gpus} GPUs, {config.gpu_clips} clips each: {1e3 * compute:.0f} ms of compute"]
    for gbit in NETWORKS_GBIT:
        between = 2 * (config.nodes - 1) / config.nodes * gradients / (gbit * 1e9 / 8)
        exchange = max(between, inside)
        step = compute + max(0.0, exchange - 2 / 3 * compute)
        rate = config.nodes * config.gpus * config.gpu_clips / step
        lines.append(
            f"network of {gbit} Gbit/s a node: exchange {1e3 * exchange:.0f} ms, step {1e3 * step:.0f} ms, "
            f"efficiency {compute / step:.2f}, {rate:,.0f} clips/s"
        )
    return lines


def step_config(config: ScalingBenchConfig) -> StepBenchConfig:
    sizes = {"clips": config.clips, "frames": config.frames, "prompts": config.frames}
    return StepBenchConfig(backbone=config.backbone, **sizes)


def main() -> int:
    config = rounds.configured(ScalingBenchConfig)
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    sides = {"one rank": (1, 1), "two ranks": (2, 2), "two apart": (2, 1)}
    timers = {name: functools.partial(side, config, *counts) for name, counts in sides.items()}
    key = config.model_dump(include={"backbone", "clips", "frames", "steps"})
    rows = rounds.run(folder / "rounds.jsonl", key, config.rounds, config.minutes, timers, folder / "out")
    if not rows:
        print("no round yet")
        return 0
    for name, (processes, _) in sides.items():
        images = processes * config.steps * config.clips * config.frames
        print(f"{name}: {rounds.spread([images / row[name]['tasks'] for row in rows])} images/s")
    for name in ("one rank", "two apart"):
        images = 2 if name == "one rank" else 1
        ratios = [images * row[name]["tasks"] / row["two ranks"]["tasks"] for row in rows]
        print(f"images/s, two ranks / {name}: {rounds.spread(ratios)}")

    model = model_of(config.backbone, config.frames, config.frames)
    gradients = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    width = clip.joint_width(model.clip)
    expected = theory(gradients, width, config.clips, 2)
    measured = median(row["two ranks"]["bytes"] for row in rows)
    print(f"gradients {gradients / 1e6:.1f} MB; sent in a step {measured / 1e6:.1f} MB, theory {expected / 1e6:.1f} MB")
    size = model.clip.visual.image_size[0]
    pixels_BFCHW = torch.zeros(1, config.frames, 3, size, size)
    of_a_clip = operations(lambda: model.frame_features(pixels_BFCHW).sum().backward())
    print(*projection(config, gradients, of_a_clip * config.gpu_frames / config.frames), sep="\n")
    return 0


if __name__ == "__main__":
    exit_with(main)
