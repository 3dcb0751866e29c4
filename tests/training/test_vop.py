"""VoP and its variants: their sizes, what they are equal to, what each frame sees."""

import pytest
import torch

from common.config import validate
from common.errors import ConfigError
from tests.training.test_models import SIZES, pixels
from training import models
from training.model_config import VoPConfig
from training.models import clip as clip_tower
from training.models.clip import open_clip

TOKENS = torch.tensor([[48, 3, 4, 49, 0, 0], [48, 5, 6, 7, 8, 49]])
PLAIN = {"visual_prompts": 0, "text_prompts": 0, "freeze_backbone": False}


def vop(std: float = 1.0, **changes: object) -> models.TwoTower:
    """A tiny VoP in float64 whose prompts matter; its frame positions too, where they begin at 0."""
    torch.manual_seed(0)
    given = {"backbone": "given", "num_frames": 4, "max_tokens": 8, "visual_prompts": 3, "text_prompts": 4}
    config = validate(VoPConfig, {**given, "specific_prompts": 2, "prompt_init_std": std, **changes})
    return models.MODELS["vop"](config, clip_tower.clip_from_config(SIZES)).double().eval()


@pytest.mark.parametrize(
    ("changes", "count"),
    [
        ({}, 122_880),
        ({"specific": "position"}, 528_384),
        ({"specific": "context"}, 14_257_152),
        ({"joint_layers": 4, "frame_positions": False}, 122_880),
        ({"joint_layers": 4}, 122_880 + 9_216),
        ({"joint_layers": 4, "specific": "position", "frame_positions": False}, 393_216),
        ({"joint_layers": 4, "specific": "context", "frame_positions": False}, 14_269_440),
    ],
)
def test_as_many_parameters_are_trained_as_the_paper_designs(changes: dict, count: int):
    """Of 119,826,432 as the paper counts: 0.103, 0.441, 11.898, 0.103, 0.328 %, as printed; F+C says 11.785."""
    with torch.device("meta"):
        clip = clip_tower.clip_from_config(open_clip.get_model_config("ViT-B-32"))
        model = models.MODELS["vop"](validate(VoPConfig, {"backbone": "ViT-B-32", **changes}), clip)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    assert sum(trained.values()) == count
    assert not any(name.startswith("clip.") for name in trained)


def test_without_prompts_it_is_clip():
    model = vop(**PLAIN)
    x = pixels()
    expected = model.clip.visual(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    torch.testing.assert_close(model.frame_features(x), expected)
    torch.testing.assert_close(model.encode_text(TOKENS).vector_TD, model.clip.encode_text(
        torch.nn.functional.pad(TOKENS, (0, 6)), normalize=True))  # fmt: skip


def test_joint_layers_of_one_frame_are_the_ordinary_ones():
    separate, joint = vop(), vop(joint_layers=2)
    joint.frame_prompts.data, joint.video_prompts.data = separate.frame_prompts.data.split([1, 2])
    x = pixels(frames=1)
    torch.testing.assert_close(joint.frame_features(x), separate.frame_features(x))


@pytest.mark.parametrize(
    ("changes", "sees_order"),
    [
        ({}, False),
        ({"specific": "position"}, True),
        ({"specific": "context"}, True),
        ({"joint_layers": 1}, False),  # frame positions begin at 0
        ({"joint_layers": 1, "specific": "position"}, True),
        ({"joint_layers": 1, "specific": "context"}, True),
    ],
)
def test_which_variants_see_the_order_of_frames(changes: dict, sees_order: bool):
    model, x = vop(**changes), pixels()
    with torch.no_grad():
        gap = model.encode_video(x).vector_BD - model.encode_video(x.flip(1)).vector_BD
        assert (gap.abs().max() > 1e-6) == sees_order
        if "joint_layers" in changes:
            torch.nn.init.normal_(model.frame_positions)
            gap = model.encode_video(x).vector_BD - model.encode_video(x.flip(1)).vector_BD
            assert gap.abs().max() > 1e-6


@pytest.mark.parametrize("changes", [{"specific": "context"}, {"joint_layers": 1}])
def test_frames_see_each_other_and_no_other_video(changes: dict):
    model, x, y = vop(**changes), pixels(), pixels()
    y[0, 1] += 1.0
    changed = (model.frame_features(x) - model.frame_features(y)).abs().amax(-1) > 1e-9
    assert changed.tolist() == [[True] * 4, [False] * 4]


def test_a_table_by_position_is_read_at_the_relative_place():
    model, x = vop(specific="position"), pixels(frames=8)
    at_half_speed = model.frame_features(x[:, ::2])
    torch.testing.assert_close(model.frame_features(x)[:, ::2], at_half_speed)
    assert model.frame_features(pixels(frames=3)).shape == (2, 3, 24)


@pytest.mark.parametrize("changes", [{}, {"text_front": True}])
def test_padding_changes_no_sentence(changes: dict):
    model, expected = vop(**changes), vop(**changes).encode_text(TOKENS)
    longer = torch.nn.functional.pad(TOKENS, (0, 2))
    torch.testing.assert_close(model.encode_text(longer).vector_TD, expected.vector_TD)
    longer[0, 4:] = 7  # behind the end token
    torch.testing.assert_close(model.encode_text(longer).vector_TD, expected.vector_TD)
    assert expected.words_TLD.shape == (2, 6, 24) and expected.mask_TL.sum(1).tolist() == [4, 6]


def test_the_released_layout_reads_behind_the_end_token():
    """Why it is not the default: only captions that nearly fill the context see the suffix at all."""
    released, other = vop(text_suffix=2), vop(text_suffix=2)
    torch.nn.init.normal_(other.text_prompts.data[:, 2:])
    gap_TD = released.encode_text(TOKENS).vector_TD - other.encode_text(TOKENS).vector_TD  # 4 and 6 of 8 words
    assert (gap_TD.abs().amax(1) > 1e-6).tolist() == [False, True]
    padded = released.encode_text(torch.nn.functional.pad(TOKENS, (0, 2)))
    torch.testing.assert_close(padded.vector_TD, released.encode_text(TOKENS).vector_TD)


def test_only_prompts_get_gradients_and_all_of_them():
    model = vop(joint_layers=1, specific="context", temporal={"layers": 2}).train()
    assert not model.clip.training
    outputs = model(pixels(), TOKENS)
    (outputs.text.vector_TD * outputs.video.vector_BD.roll(1, 0)).sum().backward()
    for name, parameter in model.named_parameters():
        # A temporal transformer beside the prompts: another head by configuration.
        reached = parameter.grad is not None and bool(parameter.grad.abs().max() > 0)
        assert reached == (not name.startswith("clip.")), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"joint_layers": 4}, "leaves none of given's 3 layers"),
        ({"joint_layers": 3, "specific": "context"}, "leaves none of given's 3 layers"),
        ({"max_tokens": 12}, "set model.max_tokens=8"),
        ({"specific": "context", "specific_prompts": 4}, "are part of the 3 of model.visual_prompts"),
        ({"text_suffix": 5}, "text_suffix=5 needs as many"),
        ({**PLAIN, "freeze_backbone": True}, "leaves nothing to train"),
        ({"temporal": {"layers": 3}}, "has 2 layers of width 24"),
    ],
)
def test_impossible_variants_are_refused(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        vop(**changes)
