"""Every kind of tower: its interface is open_clip's own, methods train on it, what won't do is refused by name."""

import copy
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tokenizers import Tokenizer, processors
from tokenizers import models as tokenizer_models
from tokenizers.pre_tokenizers import Metaspace
from torch.nn.functional import interpolate, normalize
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerFast

from common import config as configs
from common.config import apply, dump
from common.errors import ConfigError
from tests.training.test_metrics import infos
from tests.training.towers import METHODS, TOWERS, write
from training import models, optim, weights
from training.config import PRESETS, TrainConfig
from training.data.loader import EvalBatch
from training.encode import evaluate
from training.models import clip as clip_tower
from training.start import check_model
from training.step import accumulate

NO_CLS = {"vop^c", "token_shift", "token_shift, patches", "clip_vip", "ts2net"}
REFUSED: dict[str, set[str]] = {
    "clip": set(),
    "dinov2": set(),
    "clipa": {"vop", "xclip", *NO_CLS},
    "gap": NO_CLS,
    "siglip": {"vop", "xclip", *NO_CLS},
    "mobileclip": {"vop", "clip_vip"},
    "vitamin": NO_CLS,
    "eva": {"clip_vip"},
    "eva02": {"clip_vip"},
    "pe": NO_CLS,
}
every_tower = pytest.mark.parametrize("tower", TOWERS)
TOKENS = torch.zeros(2, 20, dtype=torch.int64)
TOKENS[0, :4], TOKENS[1, :6] = torch.tensor([4094, 3, 4, 4095]), torch.tensor([4094, 5, 6, 7, 8, 4095])


def config_of(tower: str, folder: Path, method: str = "mean_pool", **changes: object) -> TrainConfig:
    config = configs.load(TrainConfig, "tiny", ["data.dataset=s3://x/y"], PRESETS)
    model = {"backbone": write(tower, folder), "num_frames": 4, "captioner": None, **METHODS[method], **changes}
    caption = 0.5 if model["captioner"] else 0.0
    run = {"run.storage": str(folder), "run.name": "run", "optim.warmup": 0}
    return apply(config, {"model": model, "losses.caption": caption, **run})


def build(config: TrainConfig) -> models.Retriever:
    """In float64; nothing that begins at zero hides what is behind it, nor does a small rate."""
    torch.manual_seed(0)
    model = models.build(config.model).double()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def pixels(videos: int, frames: int = 4, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(videos, frames, 3, size, size, dtype=torch.float64, generator=generator)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@every_tower
def test_frames_and_texts_are_those_of_open_clip(tower: str, tmp_path: Path) -> None:
    model, x = build(config_of(tower, tmp_path)).eval(), pixels(2, 1)
    video, text = model.encode_video(x), model.encode_text(TOKENS)
    torch.testing.assert_close(video.frames_BFD[:, 0], model.clip.encode_image(x[:, 0]), rtol=0, atol=1e-12)
    torch.testing.assert_close(video.vector_BD, model.clip.encode_image(x[:, 0], normalize=True), rtol=0, atol=1e-12)
    torch.testing.assert_close(text.vector_TD, model.clip.encode_text(TOKENS, normalize=True), rtol=0, atol=1e-12)
    last = text.words_TLD[torch.arange(2), text.mask_TL.sum(1) - 1]
    torch.testing.assert_close(normalize(last, dim=-1), text.vector_TD)  # where scorers look for the sentence


@every_tower
@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_two_steps_or_is_refused_by_name(
    tower: str, method: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if method in REFUSED[tower]:
        with pytest.raises(
            ConfigError, match=r"needs .* which model.backbone=.*micro_\w+.json has not: choose another"
        ):
            config_of(tower, tmp_path, method)
        return
    request.getfixturevalue("alone")
    config = config_of(tower, tmp_path, method)
    torch.manual_seed(0)
    model = models.build(config.model)
    optimizer, ddp = optim.build(model, config.optim), DistributedDataParallel(model.towers)
    model.clip.set_grad_checkpointing()
    frames, tokens = torch.randint(0, 256, (2, 4, 3, 32, 32), dtype=torch.uint8), models.tokenize(config.model)
    before, weights_V = copy.deepcopy(model.state_dict()), torch.ones(model.clip.vocab_size)
    for step in range(2):
        optim.set_lr(optimizer, config.optim, step)
        optimizer.zero_grad()
        ids = tokens(["a dog runs", "cutting onions in a kitchen"])
        parts = accumulate(ddp, frames, ids, config.losses, weights_V, [2], model=model)
        assert all(part.isfinite() for part in parts.values())
        optimizer.step()
    buffers = before.keys() - {name for name, _ in model.named_parameters()}
    same = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert same == buffers | {name for name in before if name.endswith("clip.logit_bias")}

    url, batches = weights.run_url(config), [EvalBatch(frames, infos(*"ab"))]
    weights.save_best(url, model, 2, {})
    (Path(url) / "config.yaml").write_text(dump(config))
    rest = batches, tokens, config.eval, torch.device("cpu")
    assert evaluate(weights.load_run(url)[1], *rest) == evaluate(model, *rest)


@every_tower
def test_checkpointing_changes_no_gradient(tower: str, tmp_path: Path) -> None:
    found = []
    for is_on in (False, True):
        model = build(config_of(tower, tmp_path, "vop^f+p", num_frames=2)).train()
        model.clip.set_grad_checkpointing(is_on)
        calls: list[int] = []
        blocks = clip_tower._blocks(model.clip.visual)
        blocks[0].attn.register_forward_pre_hook(lambda *_, seen=calls: seen.append(1))
        torch.manual_seed(1)  # stochastic depth
        video, text = model.encode_video(pixels(2, 2)), model.encode_text(TOKENS)
        (video.vector_BD * text.vector_TD).sum().backward()
        assert len(calls) == 1 + is_on
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12)


@every_tower
def test_bf16_is_near(tower: str, tmp_path: Path) -> None:
    model, x = build(config_of(tower, tmp_path, "vop^f+p")).float().eval(), pixels(2).float()
    expected = model.encode_video(x).vector_BD
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(x, TOKENS)
        assert (outputs.video.vector_BD * expected).sum(1).min() > 0.99
        (outputs.video.vector_BD * outputs.text.vector_TD).float().sum().backward()


def test_compiling_changes_nothing_where_positions_are_turned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(config_of("eva02", tmp_path, "vop^f+p")).eval(), pixels(2)
    expected = model.frame_features(x)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    model.compile_towers()
    torch.testing.assert_close(model.frame_features(x), expected)


@pytest.mark.parametrize("tower", ["clip", "eva02", "pe"])
def test_added_tokens_have_no_place_and_each_frame_has_its_own(tower: str, tmp_path: Path) -> None:
    """Where places are turned into attention (rotary), too. Seen to fail without `images` in `timm_tower.rotary`."""
    changes = {"joint_layers": 2, "specific": None, "frame_positions": False, "num_frames": 3}
    model, x = build(config_of(tower, tmp_path, "vop^f+p", **changes)).eval(), pixels(2, 3)
    before = model.frame_features(x)
    torch.testing.assert_close(model.frame_features(x.flip(1)).flip(1), before)
    model.frame_prompts.data, model.video_prompts.data = model.frame_prompts.flip(1), model.video_prompts.flip(1)
    torch.testing.assert_close(model.frame_features(x), before)
    assert (model.frame_features(x.flip(-1)) - before).abs().max() > 1e-6  # places of patches matter


@every_tower
def test_another_resolution_resamples_the_positions_of_pretrained_weights(tower: str, tmp_path: Path) -> None:
    """Seen to fail without `force_image_size`."""
    small = build(config_of(tower, tmp_path)).float()
    torch.save(small.clip.state_dict(), tmp_path / "weights.pt")
    config = config_of(tower, tmp_path, pretrained=str(tmp_path / "weights.pt"), image_size=48)
    assert models.image_size(config.model) == 48
    large, x = models.build(config.model).double().eval(), pixels(1, 2, 48)
    expected = large.clip.encode_image(x[0])
    torch.testing.assert_close(large.encode_video(x).frames_BFD[0], expected, rtol=0, atol=1e-12)

    def table(model: models.Retriever) -> torch.Tensor:
        visual = model.clip.visual
        return visual.trunk.pos_embed[0] if hasattr(visual, "trunk") else visual.positional_embedding

    prefix = len(table(small)) - 16
    grid = table(small)[prefix:].detach().reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    grid = interpolate(grid, size=(6, 6), mode="bicubic", antialias=True)[0].flatten(1).T
    torch.testing.assert_close(table(large), torch.cat([table(small)[:prefix], grid]).double(), rtol=0, atol=1e-6)

    url = weights.run_url(config)
    weights.save_best(url, large.float(), 0, {})
    (Path(url) / "config.yaml").write_text(dump(config))
    again = weights.load_run(url)[1].double()
    torch.testing.assert_close(again.encode_video(x).frames_BFD[0], expected, rtol=0, atol=1e-5)


def tokenizer_folder(folder: Path) -> Path:
    """A tokenizer as SigLIP2's: pieces, an end token, no start token, padding with 0."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("▁dog", -2.0), ("▁runs", -2.0)]
    tokenizer = Tokenizer(tokenizer_models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "pieces")
    return folder / "pieces"


def test_a_tokenizer_of_pieces_pads_to_the_context(tmp_path: Path) -> None:
    text = {**TOWERS["siglip"]["text_cfg"], "hf_tokenizer_name": str(tokenizer_folder(tmp_path))}
    text["tokenizer_kwargs"] = {"clean": "canonicalize"}
    backbone = write("siglip", tmp_path, text_cfg=text)
    config = apply(config_of("clip", tmp_path), {"model.backbone": backbone})
    ids = models.tokenize(config.model)(["A dog runs!", "a " * 40])
    assert ids.shape == (2, 20) and ids[0].tolist() == [3, 4, 5, 1] + [0] * 16 and ids[1, -1] == 1
    model = build(config).eval()
    torch.testing.assert_close(model.encode_text(ids).vector_TD, model.clip.encode_text(ids, normalize=True))
    with pytest.raises(ConfigError, match=r"model.captioner needs CLIP's tokenizer, with its start and end tokens"):
        apply(config, {"model.captioner": {"layers": 1}, "losses.caption": 0.5})


def test_a_tokenizer_that_is_not_to_be_had_is_one_sentence(tmp_path: Path) -> None:
    text = {**TOWERS["siglip"]["text_cfg"], "hf_tokenizer_name": str(tmp_path / "nowhere")}
    backbone = write("siglip", tmp_path, text_cfg=text)
    config = apply(config_of("clip", tmp_path), {"model.backbone": backbone})
    with pytest.raises(
        ConfigError, match=r"needs the tokenizer .*nowhere, which cannot be loaded .* in a \.json of your"
    ):
        check_model(config)
