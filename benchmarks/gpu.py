"""What a GPU does in a training step: time, MFU, memory with and without each option, the largest batch, the kernels.

    python -m benchmarks.gpu [key=value ...]

The step is the training loop's: uint8 clips from pinned memory, towers, caption head, losses, clipping, fused AdamW,
under DDP of one process. For each backbone a table of `options`, each a sum of

fp32           nothing else
bf16           autocast
compile        torch.compile of the towers
checkpointing  activations made again in the backward pass
chunks         `clips` in four pieces by cached features (workers.chunk_size)

then the largest batch that fits, by doubling, and four times as many clips in pieces of that size; then the three
kernels that take most of the device's time. MFU counts two operations for each multiply-add of the plain step,
whatever an option computes again, and compares with the dense bf16 peak, fp32 too. `host waits` are the times that
the CPU waited for the GPU in a step, as torch tells them. Data is not read here: the real loop with one NCCL worker
tells its data wait and the cores that it needs in its log,

    python -m training.train prompt_switch run.name=gpu data.dataset=DATASET workers.num_workers=1 optim.steps=200

On a machine without a GPU it runs on the CPU, to try the command itself: backbones='["tiny"]' clips=4 most_clips=8.
"""

import functools
import gc
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Annotated, NamedTuple

import torch
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt
from torch.autograd import DeviceType
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from benchmarks import rounds
from benchmarks.step import alone, captions, model_of, operations
from common.config import Settings
from common.errors import exit_with
from training import losses, optim
from training.config import LossConfig, OptimConfig
from training.step import accumulate

FLAGS = ("fp32", "bf16", "compile", "checkpointing", "chunks")
# Dense bf16 with sums in fp32, TFLOP/s, as NVIDIA's data sheets give them; the first name that fits.
PEAKS = {"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "GH200": 989, "B200": 2250, "A100": 312}
PEAKS |= {"L40S": 362, "L40": 181, "L4": 121, "A10G": 70, "A10": 125, "A40": 150}
COLUMNS = ("backbone", "options", "clips", "ms a step", "clips/s", "TFLOP/s", "MFU", "peak GiB", "host waits")


def _known(options: str) -> str:
    unknown = [flag for flag in options.split("+") if flag not in FLAGS]
    if unknown:
        raise ValueError(f"{unknown[0]} is none of {', '.join(FLAGS)}")
    return options


class GpuBenchConfig(Settings):
    """What is measured, and how much of it."""

    backbones: list[str] = Field(["ViT-B-32", "ViT-B-16", "ViT-L-14"], description="model names; weights are random")
    options: list[Annotated[str, AfterValidator(_known)]] = Field(
        ["fp32", "bf16", "bf16+checkpointing", "bf16+chunks", "bf16+compile", "bf16+compile+checkpointing"],
        description="rows of the table",
    )
    largest: Annotated[str, AfterValidator(_known)] = Field("bf16", description="options of the largest batch")
    clips: PositiveInt = Field(32, description="clips in a batch")
    most_clips: PositiveInt = Field(4096, description="where the search for the largest batch ends")
    frames: PositiveInt = Field(12, description="frames of a clip")
    prompts: PositiveInt = Field(6, description="edge of the cube; frames is a multiple of it")
    words: PositiveInt = Field(32, ge=3, description="tokens of a caption with start and end")
    rounds: PositiveInt = Field(5, description="rounds; the median counts")
    steps: PositiveInt = Field(5, description="steps of a round")
    peak_tflops: PositiveFloat | None = Field(None, description="the device's dense bf16 peak; null = by its name")


class Row(NamedTuple):
    """One measurement. `peak_bytes` and `waits` are None on a CPU."""

    seconds: float
    peak_bytes: int | None
    waits: int | None


def step_of(
    config: GpuBenchConfig, backbone: str, options: str, clips: int, chunk_size: int | None, device: torch.device
) -> Callable[[], None]:
    """One whole training step, as training/loop.py takes it."""
    flags = options.split("+")
    model = model_of(backbone, config.frames, config.prompts).to(device)
    ddp = DistributedDataParallel(model.towers, forward_sync_buffers=False, gradient_as_bucket_view=True)
    settings, loss = OptimConfig(steps=1000), LossConfig(caption=0.5)
    optimizer = optim.build(model, settings)
    if "checkpointing" in flags:
        model.clip.set_grad_checkpointing()
    if "compile" in flags:
        model.compile_towers()
    size, is_cuda = model.clip.visual.image_size[0], device.type == "cuda"
    frames_BFCHW = torch.randint(0, 256, (clips, config.frames, 3, size, size), dtype=torch.uint8)
    tokens_BL = captions(model, clips, config.words)
    if is_cuda:
        frames_BFCHW, tokens_BL = frames_BFCHW.pin_memory(), tokens_BL.pin_memory()
    weights_V = losses.token_weights(model.clip.vocab_size, [1, 2, 3], 0.25).to(device)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled="bf16" in flags)

    def step() -> None:
        optim.set_lr(optimizer, settings, 10)
        optimizer.zero_grad()
        frames = frames_BFCHW.to(device, non_blocking=True)
        accumulate(ddp, frames, tokens_BL, loss, weights_V, [clips], chunk_size, autocast, model)
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()

    return step


def measured(config: GpuBenchConfig, step: Callable[[], None], device: torch.device) -> Row:
    is_cuda = device.type == "cuda"
    for _ in range(3):  # compilation, choice of kernels, allocations
        step()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(config.rounds):
        _wait(device)
        start = time.monotonic()
        for _ in range(config.steps):
            step()
        _wait(device)
        seconds.append((time.monotonic() - start) / config.steps)
    peak = torch.cuda.max_memory_allocated() if is_cuda else None
    return Row(median(seconds), peak, host_waits(step) if is_cuda else None)


def host_waits(step: Callable[[], None]) -> int:
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def attempt(
    config: GpuBenchConfig, backbone: str, options: str, clips: int, chunk_size: int | None, device: torch.device
) -> Row | None:
    """A measurement, or None if it does not fit."""
    try:
        return measured(config, step_of(config, backbone, options, clips, chunk_size, device), device)
    except torch.OutOfMemoryError:
        return None
    finally:
        if "compile" in options:
            torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()


def largest(config: GpuBenchConfig, backbone: str, device: torch.device) -> int | None:
    """The most clips, `clips` times a power of two, that fit; None if not even `clips` do."""
    once, found, clips = config.model_copy(update={"rounds": 1, "steps": 1}), None, config.clips
    while clips <= config.most_clips and attempt(once, backbone, config.largest, clips, None, device):
        found, clips = clips, 2 * clips
    return found


def kernels(config: GpuBenchConfig, backbone: str, device: torch.device) -> list[str]:
    """The three that take most of the device's time in one step, with their share."""
    step = step_of(config, backbone, config.largest, config.clips, None, device)
    step()
    is_cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if is_cuda else ProfilerActivity.CPU]) as found:
        step()
        _wait(device)
    kind, own = (DeviceType.CUDA, "self_device_time_total") if is_cuda else (DeviceType.CPU, "self_cpu_time_total")
    times = {event.key: getattr(event, own) for event in found.key_averages() if event.device_type == kind}
    total = sum(times.values())
    most = sorted(times.items(), key=lambda item: -item[1])[:3]
    return [f"{share / total:.0%} {name[:100]}" for name, share in most]


def line(
    config: GpuBenchConfig, backbone: str, options: str, clips: int, row: Row | None, of_a_clip: float, device: str
) -> str:
    if row is None:
        return f"| {backbone} | {options} | {clips} | does not fit |" + " |" * (len(COLUMNS) - 4)
    peak = config.peak_tflops or next((peak for name, peak in PEAKS.items() if name in device), None)
    rate = clips * of_a_clip / row.seconds / 1e12
    cells = [backbone, options, clips, f"{1e3 * row.seconds:.1f}", f"{clips / row.seconds:.1f}", f"{rate:.3g}"]
    cells.append("?" if peak is None else f"{rate / peak:.1%}")
    cells.append("?" if row.peak_bytes is None else f"{row.peak_bytes / 2**30:.1f}")
    return "| " + " | ".join(map(str, [*cells, "?" if row.waits is None else row.waits])) + " |"


def report(config: GpuBenchConfig, backbone: str, device: torch.device, name: str) -> None:
    of_a_clip = operations(step_of(config, backbone, "fp32", 1, None, device))
    print(f"{backbone}: {of_a_clip / 1e9:.3g} GFLOP a clip and step")
    print("| " + " | ".join(COLUMNS) + " |\n|" + " --- |" * len(COLUMNS))
    for options in config.options:
        chunk_size = -(-config.clips // 4) if "chunks" in options else None
        row = attempt(config, backbone, options, config.clips, chunk_size, device)
        print(line(config, backbone, options, config.clips, row, of_a_clip, name), flush=True)
    most = largest(config, backbone, device)
    if most is None:
        print(f"{config.clips} clips do not fit with {config.largest}")
        return
    for clips, chunk_size in ((most, None), (4 * most, most)):
        row = attempt(config, backbone, config.largest, clips, chunk_size, device)
        options = config.largest if chunk_size is None else f"{config.largest}, chunk_size={chunk_size}"
        print(line(config, backbone, options, clips, row, of_a_clip, name), flush=True)
    print(*kernels(config, backbone, device), sep="\n", flush=True)


def main() -> int:
    config = rounds.configured(GpuBenchConfig)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    torch.manual_seed(0)
    print(f"{name}, {config.frames} frames a clip, cube of {config.prompts}, torch {torch.__version__}")
    with alone(device):
        for backbone in config.backbones:
            report(config, backbone, device, name)
    return 0


if __name__ == "__main__":
    exit_with(main)
