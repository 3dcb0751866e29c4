"""What a training step costs beside plain CLIP.

    python -m benchmarks.step [key=value ...]

prompt switch   the image tower with cube, switch and aggregation, forward and backward
plain clip      open_clip's own blocks on as many tokens a frame (the prompts as constants), forward and backward
whole step      towers, caption head, losses, clipping and fused AdamW, as the training loop does them
reference step  the same in fp32 without SDPA's fused kernels and with AdamW parameter by parameter

The ratio of the first two, less the ratio of their operations (counted by torch), is what the method costs beyond its
arithmetic. On a GPU the first three run under bf16 autocast. Rounds are kept in folder/rounds.jsonl.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import rounds
from benchmarks.rounds import Times
from common.config import Settings, validate
from common.errors import exit_with
from training import losses, optim
from training.collectives import world_size
from training.config import LossConfig, OptimConfig
from training.model_config import PromptSwitchConfig
from training.models import PromptSwitch
from training.models import clip as clip_tower
from training.step import accumulate

PAIRS = [("prompt switch", "plain clip"), ("whole step", "reference step")]


class StepBenchConfig(Settings):
    """What is measured, and how much of it."""

    folder: str = Field("data/bench-step", description="local folder of the results")
    rounds: PositiveInt = Field(7, description="paired rounds")
    minutes: PositiveFloat = Field(7.0, description="no round begins that would end later; run again to go on")
    backbone: str = Field("ViT-B-32", description="open_clip model name; its weights are random")
    clips: PositiveInt = Field(2, description="clips in a batch")
    frames: PositiveInt = Field(12, description="frames of a clip")
    prompts: PositiveInt = Field(6, description="edge of the cube; frames is a multiple of it")
    words: PositiveInt = Field(16, ge=3, description="tokens of a caption with start and end")
    repeats: PositiveInt = Field(1, description="steps of a side in a round")
    threads: PositiveInt = Field(2, description="torch threads on CPUs")


def plain_features(model: PromptSwitch, prompts_1SD: Tensor, frames_BFCHW: Tensor) -> Tensor:
    """Frame features of CLIP with tokens beside the image's that nobody exchanges or reads."""
    visual = model.clip.visual
    x_NLD = clip_tower.image_tokens(visual, frames_BFCHW.flatten(0, 1))
    x_NLD = visual.transformer(torch.cat([x_NLD, prompts_1SD.expand(len(x_NLD), -1, -1)], dim=1))
    return clip_tower.project(visual, x_NLD[:, 0])


def model_of(backbone: str, frames: int, prompts: int) -> PromptSwitch:
    values = {"backbone": backbone, "num_frames": frames, "num_prompts": prompts, "captioner": {"layers": 2}}
    return PromptSwitch(validate(PromptSwitchConfig, values))


def captions(model: PromptSwitch, count: int, words: int) -> Tensor:
    """Random tokens BL between start and end."""
    end = model.clip.vocab_size - 1
    tokens_BL = torch.randint(1, end - 1, (count, words))
    tokens_BL[:, 0], tokens_BL[:, -1] = end - 1, end
    return tokens_BL


def sides_of(config: StepBenchConfig, device: torch.device) -> dict[str, Callable[[], object]]:
    """Each side's one step."""
    model = model_of(config.backbone, config.frames, config.prompts).to(device)
    size = model.clip.visual.image_size[0]
    frames_BFCHW = torch.randn(config.clips, config.frames, 3, size, size, device=device)
    tokens_BL = captions(model, config.clips, config.words)
    weights_V = losses.token_weights(model.clip.vocab_size, [1, 2, 3], 0.25).to(device)
    prompts_1SD = torch.zeros(1, config.prompts, clip_tower.image_width(model.clip.visual), device=device)
    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=device.type == "cuda")
    ddp = DistributedDataParallel(model, forward_sync_buffers=False, gradient_as_bucket_view=True)
    loss, counts = LossConfig(caption=0.5), [config.clips] * world_size()
    settings = OptimConfig(steps=1000)
    fused = optim.build(model, settings)
    plain = AdamW([{k: v for k, v in g.items() if k != "fused"} for g in fused.param_groups], foreach=False)

    def towers(features: Callable[[Tensor], Tensor]) -> None:
        model.zero_grad()
        with autocast():
            found = features(frames_BFCHW)
        found.float().sum().backward()

    def step(optimizer: AdamW, context: Callable[[], object]) -> None:
        optim.set_lr(optimizer, settings, 10)
        optimizer.zero_grad()
        accumulate(ddp, frames_BFCHW, tokens_BL, loss, weights_V, counts, autocast=context)  # type: ignore[arg-type]
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimizer.step()

    def reference() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            step(plain, nullcontext)

    return {
        "prompt switch": lambda: towers(model.frame_features),
        "plain clip": lambda: towers(functools.partial(plain_features, model, prompts_1SD)),
        "whole step": lambda: step(fused, autocast),
        "reference step": reference,
    }


def operations(act: Callable[[], object]) -> int:
    """Two for each multiply-add, forward and backward, as torch counts them.

    Attention and LSTMs in plain products: it knows the GPUs' fused kernels, but not the CPU's.
    """
    with warnings.catch_warnings(), torch.backends.mkldnn.flags(enabled=False, allow_tf32=None):
        warnings.simplefilter("ignore")  # of the flags' return to what they were
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            act()
    return counter.get_total_flops()


def timed(act: Callable[[], object], repeats: int, device: torch.device) -> Times:
    def repeat() -> None:
        for _ in range(repeats):
            act()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return rounds.seconds(repeat)


def measured(
    config: StepBenchConfig, device: torch.device, where: str, folder: Path
) -> tuple[list[dict[str, Times]], float]:
    """The rounds, and the operations of the switched tower over those of the plain one."""
    sides = sides_of(config, device)
    extra = operations(sides["prompt switch"]) / operations(sides["plain clip"])
    for act in sides.values():
        act()  # allocations and first calls
    key = {**config.model_dump(exclude={"folder", "rounds", "minutes"}), "device": where}
    timers = {name: functools.partial(timed, side, config.repeats, device) for name, side in sides.items()}
    return rounds.run(folder / "rounds.jsonl", key, config.rounds, config.minutes, timers, folder / "out"), extra


@contextmanager
def alone(device: torch.device) -> Iterator[None]:
    """A process group of this process, so that DDP is what it is in training.

    DDP must be gone at the end: as the last to hold the group, it may wait for gloo for ever.
    """
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def main() -> int:
    config = rounds.configured(StepBenchConfig)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(config.threads)
    torch.manual_seed(0)
    folder = Path(config.folder)
    folder.mkdir(parents=True, exist_ok=True)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{config.threads} CPU threads"
    with alone(device):
        rows, extra = measured(config, device, where, folder)
    if not rows:
        print("no round yet")
        return 0
    print(f"{where}, {config.backbone}, {config.clips} clips of {config.frames} frames, cube of {config.prompts}")
    images = config.clips * config.frames * config.repeats
    for side in rows[0]:
        print(f"{side}: {rounds.spread([images / row[side]['tasks'] for row in rows])} images/s")
    for ours, other in PAIRS:
        ratios = [row[ours]["tasks"] / row[other]["tasks"] for row in rows]
        print(f"seconds, {ours} / {other}: {rounds.spread(ratios)}")
    beyond = [row["prompt switch"]["tasks"] / row["plain clip"]["tasks"] / extra - 1 for row in rows]
    print(f"operations, prompt switch / plain clip: {extra:.4f}")
    print(f"overhead beyond the operations: {rounds.spread(beyond)}")
    return 0


if __name__ == "__main__":
    exit_with(main)
