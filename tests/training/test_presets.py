"""Every preset builds and trains: two steps in one process, on a tiny backbone as deep as CLIP's."""

import json
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common import config as configs
from training import models, optim
from training.backbone import BACKBONES
from training.config import PRESETS, TrainConfig
from training.step import accumulate

CAPTIONS = ["a red square moves from left to right", "a blue circle grows", "a dog", "cutting onions in a kitchen"]


def test_every_method_has_a_preset() -> None:
    presets = [configs.load(TrainConfig, name, [], PRESETS) for name in configs.preset_names(PRESETS)]
    assert {preset.model.name for preset in presets} == set(models.MODELS)
    assert {preset.model.scorer.name for preset in presets if preset.model.scorer} == set(models.SCORERS)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def deep(tmp_path_factory: pytest.TempPathFactory) -> str:
    """`tiny` with 12 layers in both towers: presets name layers by their number."""
    path = tmp_path_factory.mktemp("backbones") / "tiny12.json"
    sizes = json.loads((BACKBONES / "tiny.json").read_text())
    sizes["vision_cfg"]["layers"] = sizes["text_cfg"]["layers"] = 12
    path.write_text(json.dumps(sizes))
    return str(path)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("preset", configs.preset_names(PRESETS))
def test_a_preset_trains_two_steps(preset: str, deep: str) -> None:
    torch.manual_seed(0)
    tiny = [f"model.backbone={deep}", "model.pretrained=null", "optim.lr=1e-5", "optim.lr_new=1e-4", "optim.warmup=0"]
    config = configs.load(TrainConfig, preset, tiny, PRESETS)
    model = models.build(config.model)
    ddp = DistributedDataParallel(model.towers)
    optimizer = optim.build(model, config.optim)
    size = models.image_size(config.model)
    frames = torch.randint(0, 256, (len(CAPTIONS), config.model.num_frames, 3, size, size), dtype=torch.uint8)
    tokens = models.tokenize(config.model)(CAPTIONS)
    weights = torch.ones(model.clip.vocab_size)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    totals = []
    for step in range(2):
        optim.set_lr(optimizer, config.optim, step)
        optimizer.zero_grad()
        parts = accumulate(ddp, frames, tokens, config.losses, weights, [len(CAPTIONS)], model=model)
        assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
        optimizer.step()
        totals.append(sum(part.item() for part in parts.values()))
    assert totals[1] < totals[0]
    after = dict(model.named_parameters())
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    # A zero-initialised output hides the gradient of what feeds it for the first step only.
    assert unchanged == {name for name, p in model.named_parameters() if not p.requires_grad}
