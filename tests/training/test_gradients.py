"""The update does not depend on the number of ranks: all gradients of 1 to 4 ranks against one process."""

import datetime
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from common.config import validate
from training import losses, models
from training.config import LossConfig, PromptSwitchConfig
from training.models import clip as clip_tower

SIZES = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 50, "width": 24, "heads": 2, "layers": 2},
}
LENGTHS = [3, 12, 5, 7, 4, 9, 3, 6]
CONFIG = LossConfig(contrastive=1.0, caption=0.5)


def build() -> models.TwoTower:
    torch.manual_seed(0)
    values = {"backbone": "given", "num_frames": 4, "num_prompts": 2, "captioner": {"layers": 1}, "cube_init_std": 0.5}
    model = models.MODELS["prompt_switch"](validate(PromptSwitchConfig, values), clip_tower.clip_from_config(SIZES))
    for name, parameter in model.named_parameters():  # no zero-initialised branch hides a gradient
        torch.nn.init.normal_(parameter, std=0.2) if "out_proj" in name else None
    return model.double()


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    frames = torch.randn(8, 4, 3, 16, 16, dtype=torch.float64, generator=generator)
    tokens = torch.zeros(8, 12, dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        tokens[row, 0], tokens[row, length - 1] = 48, 49
        tokens[row, 1 : length - 1] = torch.randint(1, 48, (length - 2,), generator=generator)
    return frames, tokens, losses.token_weights(50, [1, 2, 3, 48, 49], 0.25)


def rows(rank: int, world_size: int) -> slice:
    """Unequal shares where 8 does not divide by the number of ranks."""
    return slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)


def worker(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(minutes=2)
    )
    model = build()
    ddp = DistributedDataParallel(model)
    frames, tokens, weights = batch()
    mine = rows(rank, world_size)
    # Each rank pads to its own longest caption, as its loader does.
    longest = int(clip_tower.lengths(tokens[mine]).max())
    parts = losses.compute(ddp(frames[mine], tokens[mine, :longest]), CONFIG, weights)
    (sum(parts.values()) * world_size).backward()
    if rank == 0:
        torch.save({n: p.grad for n, p in model.named_parameters()}, f"{folder}/gradients.pt")
    dist.barrier()  # nobody takes the store or a connection away while another rank still needs it
    dist.destroy_process_group()


def run_ranks(world_size: int, folder: Path) -> None:
    """Ranks that hang are told by their stacks and ended: left alone, they would hold pytest's own exit for ever."""
    ranks = mp.start_processes(
        worker, (world_size, str(folder)), nprocs=world_size, start_method="forkserver", join=False
    )
    deadline = time.monotonic() + 300
    while not ranks.join(timeout=1):
        if time.monotonic() > deadline:
            dump = [Path(sys.executable).with_name("py-spy"), "dump", "--native", "--pid"]
            stacks = [
                subprocess.run([*dump, str(p.pid)], capture_output=True, text=True)
                for p in ranks.processes
                if p.is_alive()
            ]
            for process in ranks.processes:
                process.kill()
            pytest.fail("ranks hang:\n" + "\n".join(s.stdout + s.stderr for s in stacks))


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_all_gradients_equal_those_of_one_process_with_the_whole_batch(world_size: int, tmp_path: Path):
    model = build()
    frames, tokens, weights = batch()
    sum(losses.compute(model(frames, tokens), CONFIG, weights).values()).backward()
    run_ranks(world_size, tmp_path)
    found = torch.load(tmp_path / "gradients.pt", weights_only=True)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
        torch.testing.assert_close(
            found[name], parameter.grad, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )
