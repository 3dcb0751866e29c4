"""What the methods compute: the switch, the aggregation, CLIP's own towers, frames and views."""

import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from common import config as configs
from common import storage
from common.config import validate
from common.errors import ConfigError, StorageError
from training import models
from training.config import PRESETS, TrainConfig
from training.encode import encode_clips
from training.loop import token_weights
from training.losses import FREQUENT_WORDS
from training.model_config import MeanPoolConfig, PromptSwitchConfig
from training.models import clip as clip_tower
from training.models.open_clip_lib import open_clip
from training.models.tokenizer import frequent_ids, tokenizer

SIZES = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 3, "head_width": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 50, "width": 24, "heads": 2, "layers": 2},
}


def prompt_switch(**changes: object) -> models.TwoTower:
    """A tiny Prompt Switch in float64 whose cube and aggregation matter."""
    torch.manual_seed(0)
    values = {"backbone": "given", "num_frames": 4, "num_prompts": 2, "cube_init_std": 1.0, **changes}
    model = models.MODELS["prompt_switch"](validate(PromptSwitchConfig, values), clip_tower.clip_from_config(SIZES))
    if model.aggregation is not None:
        torch.nn.init.normal_(model.aggregation.out_proj.weight, std=0.1)
    return model.double().eval()


def pixels(videos: int = 2, frames: int = 4) -> torch.Tensor:
    return torch.randn(videos, frames, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def cls_per_layer(model: models.TwoTower, x: torch.Tensor) -> list[torch.Tensor]:
    """CLS of every frame after each block, each BFD."""
    states: list[torch.Tensor] = []
    hooks = [
        block.mlp.register_forward_pre_hook(lambda _, args: states.append(args[0][:, 0].unflatten(0, x.shape[:2])))
        for block in model.clip.visual.transformer.resblocks
    ]
    with torch.no_grad():
        model.encode_video(x)
    for hook in hooks:
        hook.remove()
    return states


def test_without_prompts_the_tower_is_open_clips_own():
    model = prompt_switch(cube=False, switch="off", aggregation=False)
    x = pixels()
    expected = model.clip.visual(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    torch.testing.assert_close(model.frame_features(x), expected)


def test_text_tower_is_open_clips_own_at_any_padding():
    model = prompt_switch()
    tokens = torch.tensor([[48, 3, 4, 49, 0, 0, 0, 0, 0, 0, 0, 0], [48, 5, 6, 7, 8, 9, 49, 0, 0, 0, 0, 0]])
    expected = model.clip.encode_text(tokens, normalize=True)
    torch.testing.assert_close(model.encode_text(tokens).vector_TD, expected)
    torch.testing.assert_close(model.encode_text(tokens[:, :7]).vector_TD, expected)


def test_the_switch_lets_frames_of_a_chunk_see_each_other_from_layer_two_on():
    model = prompt_switch(aggregation=False)
    x, y = pixels(), pixels()
    y[0, 1] += 1.0  # frame 1 of video 0; chunks are frames (0, 1) and (2, 3)
    before, after = cls_per_layer(model, x), cls_per_layer(model, y)
    changed = [(a - b).abs().amax(-1) > 1e-9 for a, b in zip(before, after, strict=True)]
    assert changed[0].tolist() == [[False, True, False, False], [False] * 4]
    assert changed[1].tolist() == [[True, True, False, False], [False] * 4]


@pytest.mark.parametrize("reading", ["attention", "residual"])
def test_no_video_sees_another(reading: str):
    model = prompt_switch(switch=reading)
    x, y = pixels(), pixels()
    y[0] += 1.0
    changed = (model.frame_features(x) - model.frame_features(y)).abs().amax(-1) > 1e-9
    assert changed.tolist() == [[True] * 4, [False] * 4]  # aggregation joins the chunks of a video


def test_the_two_readings_of_the_switch_differ():
    outputs = [prompt_switch(switch=reading).frame_features(pixels()) for reading in ("attention", "residual", "off")]
    assert (outputs[0] - outputs[1]).abs().max() > 1e-3
    assert (outputs[0] - outputs[2]).abs().max() > 1e-3


def test_the_switch_of_the_residual_comes_before_each_layer_of_the_cube():
    """Seen to fail where it comes behind the layer too, and in the first layer only."""
    model, n = prompt_switch(switch="residual", cube_layers=[1, 2], aggregation=False), 5
    visual = model.clip.visual
    x = clip_tower.image_tokens(visual, pixels().flatten(0, 1))
    for layer in range(3):
        if layer == 1:
            x = torch.cat([x, model.prompt_cube.repeat(4, 1, 1)], dim=1)
        if layer > 0:
            y = x.clone()
            for first, i, j in itertools.product(range(0, 8, 2), range(2), range(2)):
                x[first + i, n + j] = y[first + j, n + i]
        x = clip_tower.run_block(visual, layer, x)
    expected = clip_tower.project(visual, clip_tower.pooled(visual, x[:, :n]).unflatten(0, (2, 4)))
    torch.testing.assert_close(model.frame_features(pixels()), expected)


def test_switch_equals_an_explicit_double_loop_and_undoes_itself():
    model = prompt_switch()
    y = torch.randn(8, 5 + 2, 32, dtype=torch.float64)  # 2 videos x 2 chunks x 2 frames, 5 image tokens
    expected = y.clone()
    for chunk in range(4):
        for i in range(2):
            for j in range(2):
                expected[2 * chunk + i, 5 + j] = y[2 * chunk + j, 5 + i]
    switched = model._switched(y, 5)
    assert torch.equal(switched, expected)
    assert torch.equal(model._switched(switched, 5), y)


def test_without_switch_and_aggregation_frames_are_independent():
    model = prompt_switch(switch="off", aggregation=False)
    x = pixels()
    alone = torch.cat([model.frame_features(x[:, 2 * k : 2 * k + 2]) for k in range(2)], dim=1)
    torch.testing.assert_close(model.frame_features(x), alone)


def test_a_fresh_aggregation_changes_nothing():
    torch.manual_seed(0)
    config = validate(PromptSwitchConfig, {"backbone": "given", "num_frames": 4, "num_prompts": 2})
    model = models.MODELS["prompt_switch"](config, clip_tower.clip_from_config(SIZES)).eval()
    with_it = model.frame_features(pixels().float())
    model.aggregation = None
    assert torch.equal(with_it, model.frame_features(pixels().float()))


def test_the_frame_count_is_read_from_the_input():
    model = prompt_switch(aggregation=False)
    x = pixels(frames=8)
    parts = torch.cat([model.frame_features(x[:, :4]), model.frame_features(x[:, 4:])], dim=1)
    torch.testing.assert_close(model.frame_features(x), parts)  # chunks meet in the aggregation only
    with pytest.raises(AssertionError, match="no multiple"):
        model.frame_features(pixels(frames=3))


def test_two_views_are_the_mean_of_two_clips():
    model = prompt_switch()
    x = pixels(frames=8)
    frames = torch.cat([model.frame_features(x[:, :4]), model.frame_features(x[:, 4:])], dim=1)
    expected = normalize(normalize(frames, dim=-1).mean(1), dim=-1)
    torch.testing.assert_close(encode_clips(model, x, views=2), expected)
    one_view = encode_clips(model, x, views=1)
    assert (one_view - expected).abs().max() > 1e-6  # one clip of 8 frames aggregates over all of them


def test_mean_pooling_cannot_tell_the_order_of_frames():
    torch.manual_seed(0)
    config = validate(MeanPoolConfig, {"backbone": "given", "num_frames": 4})
    model = models.MODELS["mean_pool"](config, clip_tower.clip_from_config(SIZES)).double().eval()
    x = pixels()
    torch.testing.assert_close(model.encode_video(x).vector_BD, model.encode_video(x.flip(1)).vector_BD)
    switched = prompt_switch()
    gap = switched.encode_video(x).vector_BD - switched.encode_video(x.flip(1)).vector_BD
    assert gap.abs().max() > 1e-3


def test_the_caption_head_reads_only_counted_positions_and_is_no_part_of_inference():
    model = prompt_switch(captioner={"layers": 1})
    tokens = torch.tensor([[48, 3, 4, 49, 0, 0], [48, 5, 6, 7, 8, 49]])
    outputs = model(pixels(), tokens)
    assert outputs.caption_targets_K.tolist() == [3, 4, 49, 5, 6, 7, 8, 49]
    changed = tokens.clone()
    changed[0, 4:] = 7  # padding
    assert torch.equal(outputs.caption_logits_KV, model(pixels(), changed).caption_logits_KV)
    before = model.encode_video(pixels()).vector_BD
    torch.nn.init.normal_(model.captioner.head.weight)
    assert torch.equal(before, model.encode_video(pixels()).vector_BD)


def test_new_modules_are_named_and_the_official_grouping_is_a_config_value():
    def groups(**changes: object) -> set[str]:
        return {n.split(".")[0] for n in prompt_switch(captioner={"layers": 1}, **changes).new_parameter_names()}

    assert groups() == {"captioner", "prompt_cube", "aggregation"}
    assert groups(aggregation_group="backbone") == {"captioner", "prompt_cube"}


def test_the_cube_can_be_in_some_layers_only():
    model, x, y = prompt_switch(aggregation=False, cube_layers=[1, 1]), pixels(), pixels()
    y[0, 1] += 1.0  # frame 1 of video 0: frame 0 sees it nowhere, as one layer reads no prompt that another wrote
    changed = (model.frame_features(x) - model.frame_features(y)).abs().amax(-1) > 1e-9
    assert changed.tolist() == [[False, True, False, False], [False] * 4]
    whole, same = prompt_switch(), prompt_switch(cube_layers=[0, 2])
    assert torch.equal(whole.frame_features(x), same.frame_features(x))


def test_a_cube_per_layer_is_one_cube_if_the_others_are_zero():
    one, many = prompt_switch(), prompt_switch(cube_per_layer=True)
    assert many.prompt_cube.shape == (3, 2, 2, 32)
    many.load_state_dict({**one.state_dict(), "prompt_cube": torch.zeros_like(many.prompt_cube)})
    many.prompt_cube.data[0] = one.prompt_cube.data
    torch.testing.assert_close(many.frame_features(pixels()), one.frame_features(pixels()))
    many.prompt_cube.data[1] += 1.0
    assert (many.frame_features(pixels()) - one.frame_features(pixels())).abs().max() > 1e-3


def test_frames_are_left_out_of_the_pooling_in_training_only():
    model, x = prompt_switch(pool_frames=2), pixels(videos=4)
    whole = model.encode_video(x)
    torch.manual_seed(0)
    drawn = model.train().encode_video(x)
    torch.testing.assert_close(drawn.frames_BFD, whole.frames_BFD)
    units_BFD = normalize(whole.frames_BFD, dim=-1)
    pairs = [normalize(units_BFD[:, [a, b]].mean(1), dim=-1) for a in range(4) for b in range(a)]
    fits = torch.stack([(pair - drawn.vector_BD).abs().amax(1) < 1e-9 for pair in pairs])
    assert fits.sum(0).tolist() == [1] * 4 and fits.any(1).sum() > 1  # a pair for each video, not all the same


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cube_layers": [2, 1]}, "is no range: write"),
        ({"cube_layers": [0, 3]}, "given's layers are 0 to 2"),
        ({"pool_frames": 5}, "more than model.num_frames=4"),
        ({"num_frames": 5}, "num_frames=5 is no multiple of model.num_prompts=2"),
        ({"cube": False}, "leaves no prompts: set model.switch=off"),
    ],
)
def test_impossible_models_are_refused(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        prompt_switch(**changes)


@pytest.mark.parametrize(
    ("backbone", "message"),
    [
        ("ViT-Z-99", "is unknown: give an open_clip name"),
        ("RN50", "only a ViT image tower"),
        ("coca_ViT-B-32", "not CoCa"),
        ("roberta-ViT-B-32", "text tower is transformers' roberta-base"),
        ("convnext_base", "only a ViT image tower"),
        ("EVA02-E-14", "not plain pre-norm attention blocks"),
    ],
)
def test_unsupported_backbones_are_refused_by_name(backbone: str, message: str):
    with pytest.raises(ConfigError, match=message) as error, torch.device("meta"):
        clip_tower.build_clip(backbone, None)
    assert backbone in str(error.value)


def test_pretrained_weights_load_from_a_file_and_a_wrong_one_is_one_sentence(tmp_path):
    torch.manual_seed(0)
    torch.save(clip_tower.build_clip("tiny", None).state_dict(), tmp_path / "weights.pt")
    torch.manual_seed(1)
    loaded = clip_tower.build_clip("tiny", str(tmp_path / "weights.pt")).state_dict()
    assert torch.equal(loaded["visual.proj"], torch.load(tmp_path / "weights.pt", weights_only=True)["visual.proj"])
    with pytest.raises(ConfigError, match=r"model.pretrained=nonsense is neither a file nor a tag of tiny"):
        clip_tower.build_clip("tiny", "nonsense")
    (tmp_path / "broken.pt").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match="cannot be loaded into tiny"):
        clip_tower.build_clip("tiny", str(tmp_path / "broken.pt"))


def test_openais_own_archives_load_and_so_do_objects_on_s3(tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    clip = clip_tower.build_clip("tiny", None)

    class Archive(torch.nn.Module):
        """As OpenAI's files: TorchScript, half precision, three sizes among the weights."""

        def __init__(self) -> None:
            super().__init__()
            self.visual = torch.nn.Module()
            for name, value in clip.state_dict().items():
                module: torch.nn.Module = self
                *path, last = name.split(".")
                for part in path:
                    if not hasattr(module, part):
                        module.add_module(part, torch.nn.Module())
                    module = getattr(module, part)
                module.register_buffer(last, value.half())
            self.register_buffer("input_resolution", torch.tensor(64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.save(torch.jit.script(Archive()), tmp_path / "openai.pt")
    storage.publish(tmp_path / "openai.pt", f"{s3}/openai.pt")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    for place in (tmp_path / "openai.pt", f"{s3}/openai.pt"):
        torch.manual_seed(1)
        loaded = clip_tower.build_clip("tiny", str(place)).state_dict()
        torch.testing.assert_close(loaded["visual.proj"], clip.visual.proj.detach().half().float())
    assert list((tmp_path / "temporary").iterdir()) == []  # no copy of the weights stays
    with pytest.raises(StorageError, match="does not exist"):
        clip_tower.build_clip("tiny", f"{s3}/none.pt")


def test_the_small_vocabulary_is_a_prefix_of_clips_own():
    small, full = tokenizer("tiny", 77), open_clip.get_tokenizer("ViT-B-32")
    text = "a red cat"  # three frequent words: one merge each
    ids = small([text])[0].tolist()
    assert ids[1:-1] == full([text])[0, 1:4].tolist()
    assert (ids[0], ids[-1]) == (4094, 4095)
    assert small(["a " * 90]).shape == (1, 77)


def test_frequent_words_are_single_tokens_with_start_and_end():
    ids = frequent_ids("tiny", ["in", "the", "elephantine"])
    assert len(ids) == 4 and {4094, 4095} <= set(ids)


def test_the_caption_loss_of_training_counts_frequent_words_less():
    """Seen to fail where `losses.frequent_weight` is not read, and with an empty list of words."""
    config = configs.load(TrainConfig, "tiny", ["losses.frequent_weight=0.125"], PRESETS)
    weights = token_weights(config, models.build(config.model))
    frequent = frequent_ids("tiny", FREQUENT_WORDS)
    assert len(frequent) == 19 and len(weights) == 4096
    assert weights[frequent].unique().tolist() == [0.125]
    assert weights.sum() == len(weights) - 19 * (1 - 0.125)
