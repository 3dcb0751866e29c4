"""Every preset builds and trains: two steps in one process, on a tiny backbone as deep as CLIP's."""

import json
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common import config as configs
from common.errors import ConfigError
from training import models, optim
from training.backbone import BACKBONES
from training.config import PRESETS, TrainConfig
from training.step import accumulate

CAPTIONS = ["a red square moves from left to right", "a blue circle grows", "a dog", "cutting onions in a kitchen"]


def test_every_method_has_a_preset() -> None:
    presets = [configs.load(TrainConfig, name, [], PRESETS) for name in configs.preset_names(PRESETS)]
    assert {preset.model.name for preset in presets} == set(models.MODELS)
    assert {preset.model.scorer.name for preset in presets if preset.model.scorer} == set(models.SCORERS)


PUBLISHED = {  # batch, frames, lr, lr_new, weight decay, betas, epochs x pairs (reference: the papers and their code)
    "prompt_switch": (128, 6, 1e-6, 3e-5, 0.2, 0.999, 5 * 180_000),
    "prompt_switch_msvd": (128, 6, 1e-6, 3e-5, 0.2, 0.999, 5 * 48_774),
    "prompt_switch_lsmdc": (128, 6, 1e-6, 3e-5, 0.2, 0.999, 5 * 101_079),
    "prompt_switch_activitynet": (128, 16, 1e-6, 3e-5, 0.2, 0.999, 20 * 10_009),
    "seq_transf": (128, 12, 1e-7, 1e-4, 0.2, 0.98, 5 * 180_000),
    "xclip": (300, 12, 1e-7, 1e-4, 0.2, 0.98, 5 * 180_000),
    "ts2net": (128, 12, 1e-7, 1e-4, 0.2, 0.98, 5 * 180_000),
    "xpool": (32, 12, 1e-6, 3e-5, 0.2, 0.999, 5 * 180_000),
    "vop_fc": (32, 12, None, None, 0.2, None, 5 * 180_000),
    "vop_fc_didemo": (32, 12, None, None, 0.2, None, 5 * 8_395),
    "clip_vip": (128, 12, 1e-6, None, 0.2, None, 5 * 180_000),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings(name: str) -> None:
    """None: not published. The length is that of the whole passes that fit."""
    config = configs.load(TrainConfig, name, [], PRESETS)
    batch, frames, lr, lr_new, decay, beta, pairs = PUBLISHED[name]
    assert (config.optim.batch_size, config.model.num_frames, config.optim.weight_decay) == (batch, frames, decay)
    assert config.optim.steps in (pairs // batch, -(-pairs // batch))
    for published, ours in ((lr, config.optim.lr), (lr_new, config.optim.lr_new), (beta, config.optim.betas[1])):
        assert published in (None, ours)


@pytest.mark.parametrize(
    ("preset", "overrides", "message"),
    [
        ("clip_vip", ["losses.frame_contrastive=0.5"], "no meaning for clip_vip"),
        ("vop", ["model.text_suffix=4", 'model.scorer={"name": "xpool"}'], "model.text_suffix has no meaning under"),
    ],
)
def test_pairs_that_mean_nothing_are_refused(preset: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configs.load(TrainConfig, preset, overrides, PRESETS)


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
