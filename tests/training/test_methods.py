"""What holds for every method: it trains what it says, saves, loads, evaluates; no video sees another."""

import copy
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from common import config as configs
from common.config import apply, dump
from common.errors import ConfigError
from tests.golden import objective
from tests.training.test_metrics import infos
from tests.training.test_presets import CAPTIONS
from training import model_config, models, optim, weights
from training.checkpoint import State
from training.config import PRESETS, TrainConfig
from training.data.loader import EvalBatch
from training.encode import encode_clips, evaluate
from training.models import text_conditioned
from training.models.token_shift import shift_cls, shift_patches
from training.models.ts2net import top_k
from training.models.xclip import XClip
from training.step import accumulate

PROMPTS = {"name": "vop", "prompt_init_std": 0.5}
METHODS: dict[str, dict] = {
    "mean_pool": {"name": "mean_pool"},
    "seq_transf": {"name": "seq_transf", "temporal": {"layers": 2}},
    "prompt_switch": {"name": "prompt_switch", "num_prompts": 2},
    "prompt_switch, baseline": {"name": "prompt_switch", "cube": False, "switch": "off", "aggregation": False},
    "prompt_switch, cube": {"name": "prompt_switch", "num_prompts": 2, "switch": "off", "aggregation": False},
    "prompt_switch, switch": {"name": "prompt_switch", "num_prompts": 2, "aggregation": False},
    "prompt_switch, residual": {"name": "prompt_switch", "num_prompts": 2, "switch": "residual"},
    "prompt_switch, frozen": {"name": "prompt_switch", "num_prompts": 2, "freeze_backbone": True},
    "prompt_switch, some layers": {"name": "prompt_switch", "num_prompts": 2, "cube_layers": [1, 2]},
    "prompt_switch, per layer": {"name": "prompt_switch", "num_prompts": 2, "cube_per_layer": True, "pool_frames": 3},
    "prompt_switch, seqTransf": {"name": "prompt_switch", "num_prompts": 2, "temporal": {"layers": 1}},
    "vop": PROMPTS,
    "vop^p": {**PROMPTS, "specific": "position"},
    "vop^c": {**PROMPTS, "specific": "context"},
    "vop^f": {**PROMPTS, "joint_layers": 2},
    "vop^f+p": {**PROMPTS, "joint_layers": 2, "specific": "position"},
    "vop^f+c": {**PROMPTS, "joint_layers": 2, "specific": "context"},
    "vop, seqTransf": {**PROMPTS, "temporal": {"layers": 1}},
    "token_shift": {"name": "token_shift"},
    "token_shift, patches": {"name": "token_shift", "shift": "patches", "div": 7, "last_layers": 2},
    "ts2net": {"name": "ts2net", "temporal": {"layers": 2}, "samples": 20},
    "clip_vip": {"name": "clip_vip", "proxy_init_std": 0.5},
}
every_method = pytest.mark.parametrize("method", METHODS)
XPOOL, XCLIP = {"scorer": {"name": "xpool", "heads": 2}}, {"scorer": {"name": "xclip"}}
SCORED: dict[str, dict] = {
    "mean_pool, xpool": {"name": "mean_pool", **XPOOL},
    "prompt_switch, xpool": {"name": "prompt_switch", "num_prompts": 2, **XPOOL},
    "vop^f+c, xpool": {**PROMPTS, "joint_layers": 2, "specific": "context", **XPOOL},
    "seq_transf, xclip": {**METHODS["seq_transf"], "max_tokens": 32, **XCLIP},
    "mean_pool, xclip, padded": {
        "name": "mean_pool",
        "max_tokens": 16,
        "scorer": {"name": "xclip", "padded_words": True},
    },
    "prompt_switch, xclip": {**METHODS["prompt_switch"], **XCLIP},
    "ts2net, ts2net": {**METHODS["ts2net"], "scorer": {"name": "ts2net"}},
    "prompt_switch, ts2net": {**METHODS["prompt_switch"], "scorer": {"name": "ts2net"}},
}


def test_all_methods_are_here() -> None:
    assert {values["name"] for values in METHODS.values()} == set(models.MODELS)
    assert {values["scorer"]["name"] for values in SCORED.values()} == set(models.SCORERS)


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def config_of(method: str, folder: Path = Path("runs")) -> TrainConfig:
    """The preset `tiny` with another method and the moving average on."""
    config = configs.load(TrainConfig, "tiny", ["data.dataset=s3://x/y"], PRESETS)
    captions = {"captioner": {"layers": 1}, "caption": 0.5} if "prompt_switch" in method else {"caption": 0.0}
    model = {"backbone": "tiny", "num_frames": 4, "captioner": captions.get("captioner"), **(METHODS | SCORED)[method]}
    changes = {"model": model, "losses.caption": captions["caption"], "optim.ema": 0.5, "optim.warmup": 0}
    return apply(config, {**changes, "run.storage": str(folder), "run.name": "run"})


def build(method: str) -> models.Retriever:
    """In float64; nothing that begins at zero hides what is behind it."""
    torch.manual_seed(0)
    model = models.build(config_of(method).model).double()
    for name, parameter in model.named_parameters():
        if not name.startswith("clip.") and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def pixels(videos: int, frames: int = 4) -> torch.Tensor:
    return torch.randn(videos, frames, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("method", [*METHODS, *SCORED])
def test_it_trains_saves_loads_and_evaluates(method: str, tmp_path: Path) -> None:
    config = config_of(method, tmp_path)
    torch.manual_seed(0)
    model = models.build(config.model)
    state = State(model, optim.build(model, config.optim), optim.average(model, config.optim))
    ddp = DistributedDataParallel(model.towers)
    generator = torch.Generator().manual_seed(0)
    frames = torch.randint(0, 256, (len(CAPTIONS), 4, 3, 32, 32), dtype=torch.uint8, generator=generator)
    tokens = models.tokenize(config.model)(CAPTIONS)
    before, steps = copy.deepcopy(model.state_dict()), []
    for step in range(2):
        optim.set_lr(state.optimizer, config.optim, step)
        state.optimizer.zero_grad()
        weights_V = torch.ones(model.clip.vocab_size)
        parts = accumulate(ddp, frames, tokens, config.losses, weights_V, [len(CAPTIONS)], 2, model=model)
        assert all(part.isfinite() for part in parts.values())
        state.optimizer.step()
        state.ema.update_parameters(model)
        steps.append(copy.deepcopy(dict(model.named_parameters())))
    for name, averaged in state.best.named_parameters():  # a copy after the first step, then 0.5 of it
        torch.testing.assert_close(averaged, (steps[0][name] + steps[1][name]) / 2)
    buffers = before.keys() - {name for name, _ in model.named_parameters()}
    fixed = {n for n in before if "clip." in n} if config.model.freeze_backbone else set()
    for values in (model.state_dict(), state.best.state_dict()):
        assert {name for name in before if torch.equal(values[name], before[name])} == fixed | buffers

    url = weights.run_url(config)
    weights.save_best(url, state.best, 2, {"r1": 0.5})
    (Path(url) / "config.yaml").write_text(dump(config))
    again, loaded = weights.load_run(url)
    assert again == config
    rest = [EvalBatch(frames, infos(*"abcd"))], models.tokenize(config.model), config.eval, torch.device("cpu")
    assert evaluate(loaded, *rest) == evaluate(state.best, *rest)
    resumed = State(models.build(config.model), optim.build(model, config.optim), optim.average(model, config.optim))
    resumed.load(state.values())


@every_method
def test_no_video_depends_on_another_and_any_frame_count_works(method: str) -> None:
    model, x = build(method).eval(), pixels(3)
    together = model.encode_video(x)
    torch.testing.assert_close(model.encode_video(x[1:2]).vector_BD, together.vector_BD[1:2])
    torch.testing.assert_close(together.vector_BD.norm(dim=1), torch.ones(3, dtype=torch.float64))
    for frames in (2, 6, 8):
        assert model.encode_video(pixels(1, frames)).vector_BD.shape == (1, 64)
    torch.testing.assert_close(encode_clips(model, x, views=1), together.vector_BD)


@pytest.mark.parametrize("method", SCORED)
def test_a_scorer_reads_of_each_text_and_video_what_it_is_alone_and_scores_in_pieces(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail where X-CLIP's query is not zero at padding, as a sentence shorter than another has it.

    The pieces, where only the texts were split: one query over a million videos would take gigabytes.
    """
    model, encode = build(method).eval(), models.tokenize(config_of(method).model)
    assert isinstance(model, models.TextConditioned)
    query_TQD = model.query(model.towers.encode_text(encode(CAPTIONS)))
    alone = [model.query(model.towers.encode_text(encode([caption]))) for caption in CAPTIONS]
    key_VKD = encode_clips(model, pixels(3), views=1)
    expected = model.score(query_TQD, key_VKD)
    assert expected.shape == (4, 3) and expected.abs().max() <= 1
    with torch.no_grad():
        held, of_pairs = [], model.scorer.pairs

        def counted(query: torch.Tensor, cached: torch.Tensor) -> torch.Tensor:
            held.append(len(query) * len(cached) * model.scorer.values_per_pair(query, cached))
            return of_pairs(query, cached)

        monkeypatch.setattr(model.scorer, "pairs", counted)
        for pairs_at_once in (1, 3, 7):
            most = pairs_at_once * model.scorer.values_per_pair(query_TQD, model.scorer.cached(key_VKD))
            monkeypatch.setattr(text_conditioned, "SCORER_VALUES", most)
            torch.testing.assert_close(model.score(query_TQD, key_VKD), expected)
            assert max(held) <= most
            held.clear()
        pairs = [[model.score(t, encode_clips(model, v[None], views=1)) for v in pixels(3)] for t in alone]
        torch.testing.assert_close(torch.stack([torch.cat(row) for row in pairs])[..., 0], expected)


def test_more_views_are_more_frames_to_a_scorer() -> None:
    for method in ("mean_pool, xpool", "ts2net, ts2net"):
        assert encode_clips(build(method).eval(), pixels(3, 8), views=2).shape == (3, 8, 64)
    with pytest.raises(ConfigError, match=r"more frames than the scorer xclip is made for: set eval.views=1"):
        apply(config_of("seq_transf, xclip"), {"eval.views": 2})


def test_room_for_more_words_changes_no_score_of_x_clip() -> None:
    """Seen to fail where its softmax includes padding."""
    model = build("seq_transf, xclip").eval()
    text = model.towers.encode_text(models.tokenize(config_of("seq_transf, xclip").model)(CAPTIONS))
    key_VKD = encode_clips(model, pixels(3), views=1)
    narrow, wide = (XClip(model_config.XClipConfig(), model.clip, 4, words).double() for words in (24, 77))
    torch.testing.assert_close(wide(wide.query(text), key_VKD), narrow(narrow.query(text), key_VKD))


def test_x_clip_reads_the_frames_before_the_temporal_transformer_and_the_vector_behind_it() -> None:
    model = build("seq_transf, xclip").eval()
    key_VKD, video = encode_clips(model, pixels(3), views=1), model.towers.encode_video(pixels(3))
    torch.testing.assert_close(key_VKD[:, 0], video.vector_BD)
    alone_BFD = model.towers.frame_features(pixels(3))
    torch.testing.assert_close(key_VKD[:, 1:], torch.nn.functional.normalize(alone_BFD, dim=-1))
    assert (video.frames_BFD - alone_BFD).abs().max() > 1e-3


def test_x_clips_padding_counts_where_the_official_code_is_wanted() -> None:
    """Without padding to the full length first, a score would depend on the longest sentence of the batch."""
    model, encode = (f("mean_pool, xclip, padded") for f in (build, lambda m: models.tokenize(config_of(m).model)))
    assert encode(CAPTIONS[2:3]).shape == (1, 16)
    text, key_VKD = model.towers.encode_text(encode(CAPTIONS)), encode_clips(model, pixels(3), views=1)
    other = text._replace(words_TLD=torch.where(text.mask_TL[..., None], text.words_TLD, 1.0))
    gap_TV = model.score(model.query(other), key_VKD) - model.score(model.query(text), key_VKD)
    assert gap_TV.abs().max() > 1e-6
    model.scorer.padded_words = False
    assert torch.equal(model.score(model.query(other), key_VKD), model.score(model.query(text), key_VKD))


def test_ts2net_selects_the_same_tokens_twice_unless_it_is_to_be_as_the_official_code() -> None:
    model, x = build("ts2net").eval(), pixels(2)
    assert torch.equal(model.encode_video(x).frames_BFD, model.encode_video(x).frames_BFD)
    model.config = model.config.model_copy(update={"noise_in_eval": True})
    assert not torch.equal(model.encode_video(x).frames_BFD, model.encode_video(x).frames_BFD)


def test_little_noise_selects_the_best_tokens_and_much_of_it_any() -> None:
    scores_NP = torch.tensor([[0.1, 0.9, 0.2, 0.8]], dtype=torch.float64, requires_grad=True)
    noise_NSP = torch.randn(1, 200, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    best_NkP = torch.tensor([[[0, 1, 0, 0], [0, 0, 0, 1]]], dtype=torch.float64)
    assert torch.equal(top_k(scores_NP, 2), best_NkP)
    assert torch.equal(top_k(scores_NP, 2, noise_NSP, 1e-6), best_NkP)
    much_NkP = top_k(scores_NP, 2, noise_NSP, 10.0)
    assert (much_NkP.sum(-1) == 1).all() and (much_NkP[0, 0, :3] > 0).all() and not much_NkP[0, 0, 3]
    diagonal = torch.autograd.functional.jacobian(lambda z: top_k(z, 2, noise_NSP, 10.0), scores_NP)[0, ..., 0, :]
    whole = torch.autograd.functional.jacobian(lambda z: top_k(z, 2, noise_NSP, 10.0, True), scores_NP)[0, ..., 0, :]
    expected = torch.zeros(2, 4, 4, dtype=torch.float64)
    for noise_P in noise_NSP[0]:
        for j, place in enumerate((scores_NP[0] + 10 * noise_P).topk(2).indices.sort().values):
            expected[j, place] += noise_P / (200 * 10)
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(diagonal, expected * torch.eye(4))


def gradients(model: models.TwoTower, x: torch.Tensor) -> dict[str, torch.Tensor]:
    tokens = torch.tensor([[4094, 3, 4, 4095, 0, 0], [4094, 5, 6, 7, 8, 4095]])
    outputs = model(x, tokens)
    if outputs.caption_logits_KV is not None:
        sum(objective(outputs, tokens, torch.ones(4096, dtype=x.dtype)).values()).backward()
    else:
        (outputs.text.vector_TD * outputs.video.vector_BD.roll(1, 0)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@every_method
def test_checkpointing_changes_no_gradient(method: str) -> None:
    expected, model = gradients(build(method).train(), pixels(2)), build(method).train()
    model.clip.set_grad_checkpointing()
    assert_equal(gradients(model, pixels(2)), expected)


@pytest.mark.parametrize("method", ["seq_transf", "vop^f+c", "token_shift, patches", "ts2net", "clip_vip"])
def test_compiling_changes_no_gradient(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, model = gradients(build(method).train(), pixels(2)), build(method).train()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    model.compile_towers()
    assert_equal(gradients(model, pixels(2)), expected)


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)


@every_method
def test_bf16_is_near(method: str) -> None:
    model, x = build(method).float().eval(), pixels(2).float()
    expected = model.encode_video(x).vector_BD
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x, torch.tensor([[4094, 3, 4095], [4094, 5, 4095]]))
        assert (found.video.vector_BD * expected).sum(1).min() > 0.99
        found.video.vector_BD.float().sum().backward()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "mean_pool", "freeze_backbone": True}, "leaves nothing to train"),
        ({"name": "mean_pool", "freeze_backbone": True, **XPOOL}, "leaves nothing to train in the towers"),
        ({"name": "token_shift", "freeze_backbone": True}, "leaves nothing to train"),
        ({"name": "mean_pool", "temporal": {"layers": 1}}, "set model.name=seq_transf"),
        ({"name": "clip_vip", "captioner": {"layers": 1}}, "clip_vip has no frame features: set"),
        ({"name": "clip_vip", **XCLIP}, "clip_vip has no frame features: set"),
        ({"name": "ts2net", "temporal": None}, "model.temporal"),
    ],
)
def test_impossible_combinations_are_refused(model: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply(config_of("mean_pool"), {"model": {"backbone": "tiny", **model}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "token_shift", "last_layers": 9}, "model.last_layers=9 is more than tiny's 4 layers"),
        ({"name": "token_shift", "shift": "patches", "div": 18}, "model.div=18 is more than the 17 image tokens"),
        ({"name": "seq_transf", "temporal": {"layers": 3}}, "text tower, which has 2 layers of width 64"),
        ({"name": "ts2net", "temporal": {"layers": 1}, "num_selected": 17}, "17 is more than the 16 patches of tiny"),
        ({"name": "ts2net", "temporal": {"layers": 1}, "num_frames": 20}, "num_frames=20 with 4 tokens each"),
        ({"name": "seq_transf", "temporal": {"layers": 1}, "num_frames": 78}, "more than model.temporal's 77"),
    ],
)
def test_what_a_backbone_cannot_carry_is_refused_by_name(changes: dict, message: str) -> None:
    config = apply(config_of("mean_pool"), {"model": {"backbone": "tiny", **changes}})
    with pytest.raises(ConfigError, match=message):
        models.build(config.model)


def test_one_frame_has_no_neighbours_to_shift_from() -> None:
    x = torch.randn(2, 1, 9, 8)
    assert torch.equal(shift_patches(x, 7), x)
    assert torch.equal(shift_cls(x, 4)[:, :, 1:], x[:, :, 1:]) and not shift_cls(x, 4)[:, :, 0, :4].any()
