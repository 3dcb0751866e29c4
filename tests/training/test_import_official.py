"""Checkpoints of official implementations become runs: under their names, each tensor in its place, or refused."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from common import config as configs
from common.errors import ConfigError
from tests.entry import assert_refused, run
from training import models, weights
from training.config import PRESETS, TrainConfig
from training.import_official import import_official, renamed

TINY = {"backbone": "tiny", "num_frames": 4}
# Prefixes that the official heads have for ours, as in shared/golden and the repositories.
OFFICIAL: dict[str, tuple[dict, dict[str, str]]] = {
    "OpenAI": ({"name": "mean_pool"}, {"clip.": ""}),
    "CLIP4Clip": ({"name": "seq_transf", "temporal": {"layers": 2}}, {"temporal.": ""}),
    "X-CLIP": (
        {"name": "seq_transf", "temporal": {"layers": 2}, "max_tokens": 32, "scorer": {"name": "xclip"}},
        {"towers.temporal.": "", "towers.": "", "scorer.": ""},
    ),
    "TS2-Net": (
        {"name": "ts2net", "temporal": {"layers": 2}, "scorer": {"name": "ts2net"}},
        {"towers.temporal.": "", "towers.predictor.": "visual_token_selector.score_predictor.", "towers.": ""},
    ),
    "X-Pool": ({"name": "mean_pool", "scorer": {"name": "xpool"}}, {"towers.": "", "scorer.": "pool_frames."}),
    "VoP": (
        {"name": "vop", "text_suffix": 4},
        {"frame_prompts": "visual_prompt_learner.visual_prompts", "text_prompts": "text_prompt_learner.text_prompts"},
    ),
}


def config_of(model: dict, folder: Path) -> TrainConfig:
    config = configs.load(TrainConfig, "tiny", ["data.dataset=s3://x/y", f"run.storage={folder}"], PRESETS)
    return configs.apply(config, {"model": {**TINY, **model}, "losses.caption": 0.5 if "captioner" in model else 0})


def official_of(model: models.Retriever, prefixes: dict[str, str]) -> dict[str, torch.Tensor]:
    found = {}
    for name, value in model.state_dict().items():
        ours = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        found[prefixes.get(ours, "") + name.removeprefix(ours)] = value
    return found


@pytest.mark.parametrize("official", OFFICIAL)
def test_every_tensor_of_a_checkpoint_finds_its_place(official: str, tmp_path: Path) -> None:
    model_values, prefixes = OFFICIAL[official]
    config = config_of(model_values, tmp_path)
    torch.manual_seed(1)
    expected = models.build(config.model)
    values = official_of(expected, prefixes)
    if official == "VoP":
        values["visual_prompt_learner.visual_prompts"] = values["visual_prompt_learner.visual_prompts"][:, None]
        values["image_encoder.ln_pre.weight"] = values["clip.visual.ln_pre.weight"]  # its alias
        values = {f"module.{name}": value.half() for name, value in values.items()}
        expected = expected.half().float()
    if official == "CLIP4Clip":
        values |= {"cross.pooler.dense.bias": torch.zeros(3), "similarity_dense.bias": torch.zeros(1)}
    torch.save({"epoch": 3, "state_dict": values} if official in ("VoP", "X-Pool") else values, tmp_path / "x.pth")
    output = import_official(config, str(tmp_path / "x.pth"), str(tmp_path / "out"))
    again, loaded = weights.load_run(output)
    assert again == config
    found = loaded.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())


def test_prompt_switch_comes_from_hugging_faces_clip_and_its_moving_average(tmp_path: Path) -> None:
    """Its towers give what transformers' own give; the cube, the aggregation and the caption head are in place."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    both = {"hidden_act": "gelu", "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4}
    theirs = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={
                **both,
                "vocab_size": 4096,
                "num_hidden_layers": 2,
                "bos_token_id": 4094,
                "eos_token_id": 4095,
            },
            vision_config={**both, "image_size": 32, "patch_size": 8, "num_hidden_layers": 4},
            projection_dim=64,
            attn_implementation="eager",
        )
    ).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    config = config_of({"name": "prompt_switch", "num_prompts": 2, "captioner": {"layers": 1}}, tmp_path)
    ours = models.build(config.model)
    new = {"prompt_cube": "clip.vision_model.encoder.prompt_embedding", "aggregation.": "clip.vision_model.attn."}
    new |= {"captioner.prenorm.": "caption_prenorm.", "captioner.decoder.": "caption_transformer."}
    new |= {"captioner.head.": "caption_head."}
    values = {k: v for k, v in official_of(ours, new).items() if not k.startswith("clip.") or "vision_model" in k}
    average = {**values, **{f"clip.{name}": value for name, value in theirs.state_dict().items()}}
    average["clip.text_model.embeddings.position_ids"] = torch.arange(77)[None]  # transformers 4 kept it
    torch.save({"state_dict": {"x": torch.zeros(1)}, "state_dict_ema": average}, tmp_path / "model_best.pth")
    _, loaded = weights.load_run(import_official(config, str(tmp_path / "model_best.pth"), str(tmp_path / "out")))
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in ours.state_dict().items() if "clip." not in k)

    plain = models.build(config_of({"name": "mean_pool"}, tmp_path).model, loaded.clip).eval()
    pixels, tokens = torch.randn(2, 3, 32, 32), torch.tensor([[4094, 3, 4, 4095, 0], [4094, 5, 6, 7, 4095]])
    with torch.no_grad():
        images = theirs.visual_projection(theirs.vision_model(pixels).pooler_output)
        sentences = theirs.text_projection(theirs.text_model(tokens).pooler_output)
        torch.testing.assert_close(plain.frame_features(pixels[:, None])[:, 0], images, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            plain.encode_text(tokens).vector_TD, normalize(sentences, dim=-1), rtol=1e-4, atol=1e-5
        )


def test_openais_archive_is_read(tmp_path: Path) -> None:
    class Archive(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = torch.nn.Module()
            self.visual.register_buffer("proj", torch.eye(2).half())
            self.register_buffer("vocab_size", torch.tensor(7))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.save(torch.jit.script(Archive()), tmp_path / "ViT-B-32.pt")
    with pytest.raises(ConfigError, match=r"ViT-B-32.pt lacks clip.ln_final.bias, .* \(\d+ in all\): choose a preset"):
        import_official(config_of({"name": "mean_pool"}, tmp_path), str(tmp_path / "ViT-B-32.pt"), str(tmp_path / "o"))


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    config, file = config_of({"name": "mean_pool"}, tmp_path), tmp_path / "x.pth"
    values = official_of(models.build(config.model), {"clip.": ""})
    for change, message in (
        ({"frame_position_embeddings.weight": torch.zeros(2)}, "also has temporal.frame_position_embeddings.weight"),
        ({"visual.proj": torch.zeros(2, 2)}, r"clip.visual.proj of size \[2, 2\], not \[64, 64\]"),
    ):
        torch.save({**values, **change}, file)
        with pytest.raises(ConfigError, match=message):
            import_official(config, str(file), str(tmp_path / "out"))
    file.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be read"):
        import_official(config, str(file), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    assert_refused(run("training.import_official", "tiny", f"{tmp_path}/none.pth", f"{tmp_path}/out"), "does not exist")
    assert_refused(run("training.import_official", "tiny"), "expected a preset, a checkpoint and an output, got 1")


def test_names_are_changed_once() -> None:
    values = {"logit_scale": torch.zeros(()), "clip.transformer.resblocks.0.ln_1.bias": torch.zeros(1)}
    assert list(renamed(values)) == ["clip.logit_scale", "clip.transformer.resblocks.0.ln_1.bias"]
