"""New training from old weights: what is kept, what is new, what is refused."""

import json
import logging
from pathlib import Path

import pytest
import torch

from common import storage
from common.config import apply, dump
from common.errors import ConfigError, RunError
from tests.training.test_methods import config_of
from training import models, weights
from training.backbone import BACKBONES
from training.config import TrainConfig
from training.export import export
from training.start import check_model, load_initial

XPOOL = {"name": "xpool"}


def written(config: TrainConfig) -> str:
    """A run of that model, its weights random; its folder."""
    torch.manual_seed(1)
    url = weights.run_url(config)
    weights.save_best(url, models.build(config.model), 3, {})
    storage.publish_bytes(dump(config).encode(), storage.join(url, "config.yaml"))
    return url


def started(config: TrainConfig) -> models.Retriever:
    check_model(config)
    torch.manual_seed(2)
    model = models.build(config.model)
    load_initial(config, model)
    return model


def from_run(url: str, method: str, **changes: object) -> TrainConfig:
    model = {"model.init_from": url, **{f"model.{key}": value for key, value in changes.items()}}
    return apply(config_of(method), model)


def test_the_same_model_starts_where_the_old_one_ended(tmp_path: Path) -> None:
    url = written(config_of("prompt_switch", tmp_path))
    export(url, str(tmp_path / "export"))
    for place in (url, str(tmp_path / "export")):
        model = started(from_run(place, "prompt_switch", pretrained="never/read.pt"))
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in weights.read_best(url)[0].items())


@pytest.mark.parametrize(
    ("old", "new", "added"),
    [
        ("mean_pool", "prompt_switch", "aggregation, captioner, prompt_cube"),
        ("mean_pool", "vop^c", "context, frame_prompts, text_prompts"),
        ("seq_transf", "mean_pool", "nothing"),
        ("prompt_switch, xpool", "prompt_switch", "nothing"),
        ("prompt_switch", "prompt_switch, xpool", "scorer"),
    ],
)
def test_what_is_new_is_told_and_heads_may_be_left(
    old: str, new: str, added: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also between a scorer's towers and the same alone, whose names differ."""
    changes = {"losses.caption": 0.0, "model.captioner": None} if "xpool" in new else {}
    url = written(config_of(old, tmp_path))
    with caplog.at_level(logging.INFO):
        model = started(apply(from_run(url, new), changes))
    assert f"new here: {added}" in caplog.text
    values = {name.removeprefix("towers."): value for name, value in weights.read_best(url)[0].items()}
    names = {name: name.removeprefix("towers.") for name in model.state_dict()}
    for name, value in model.state_dict().items():
        is_kept = names[name] in values and torch.equal(value, values[names[name]])
        assert is_kept == (names[name].split(".")[0] not in added), name


@pytest.mark.parametrize(
    ("old", "new", "changes", "message"),
    [
        ("prompt_switch", "mean_pool", {}, "there is no aggregation here; there is no prompt_cube here"),
        (
            "prompt_switch",
            "prompt_switch",
            {"num_prompts": 4},
            r"prompt_cube is \[2, 2, 64\] there and \[4, 4, 64\] here",
        ),
        ("vop^p", "vop^p", {"num_frames": 6}, r"position_prompts is \[4, 4, 4, 64\] there and \[4, 6, 4, 64\] here"),
        ("seq_transf", "seq_transf", {"temporal": {"layers": 1}}, r"temporal.transformerClip.* there and absent here"),
        ("mean_pool", "mean_pool", {"image_size": 48}, r"positional_embedding is \[17, 64\] there and \[37, 64\] here"),
    ],
)
def test_what_differs_is_refused_by_name(old: str, new: str, changes: dict, message: str, tmp_path: Path) -> None:
    config = from_run(written(config_of(old, tmp_path)), new, **changes)
    with pytest.raises(ConfigError, match=f"does not fit the model: .*{message}"):
        check_model(config)
    with pytest.raises(ConfigError, match=message):
        load_initial(config, models.build(config.model))


def test_towers_of_another_function_are_refused_though_their_sizes_are_the_same(tmp_path: Path) -> None:
    url = written(config_of("mean_pool", tmp_path))
    (tmp_path / "quick.json").write_text(
        json.dumps({**json.loads((BACKBONES / "tiny.json").read_text()), "quick_gelu": True})
    )
    with pytest.raises(
        ConfigError, match=r"has model\.backbone=tiny and model.pretrained=None, which say what its towers"
    ):
        check_model(from_run(url, "mean_pool", backbone=str(tmp_path / "quick.json")))


def test_what_is_no_run_or_has_no_weights_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is not the folder of a run"):
        check_model(from_run(str(tmp_path / "nothing"), "mean_pool"))
    url = written(config_of("mean_pool", tmp_path))
    Path(weights.best_url(url)).unlink()
    with pytest.raises(RunError, match="has no best weights"):
        check_model(from_run(url, "mean_pool"))
