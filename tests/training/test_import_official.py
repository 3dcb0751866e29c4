"""Official checkpoints: small files with their names, from the reference weights, give the reference outputs."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from common import storage
from common.errors import ConfigError
from tests.conftest import REPOSITORY
from tests.entry import assert_refused, run
from tests.golden import Golden, clip_sizes
from tests.parity import read
from training import models, weights
from training.import_official import OPENAI, _backbone, import_official
from training.models.clip import build_clip, clip_from_config

GOLDEN = REPOSITORY.parent / "shared" / "golden"
pytestmark = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="reference tensors (../shared/golden) are not on this machine"
)
TRANSFORMERS = (  # OpenAI's names of CLIP, and those that transformers and Prompt Switch's code have
    (r"^(text_projection|visual_projection)$", r"clip.\1.weight"),
    (r"^(token_embedding\.weight)$", r"clip.text_model.embeddings.\1"),
    (r"^positional_embedding$", "clip.text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "clip.text_model.final_layer_norm."),
    (r"^transformer\.resblocks\.", "clip.text_model.encoder.layers."),
    (r"^visual\.class_embedding$", "clip.vision_model.embeddings.class_embedding"),
    (r"^visual\.conv1\.", "clip.vision_model.embeddings.patch_embedding."),
    (r"^visual\.positional_embedding$", "clip.vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.ln_pre\.", "clip.vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "clip.vision_model.post_layernorm."),
    (r"^visual\.transformer\.resblocks\.", "clip.vision_model.encoder.layers."),
    (r"^logit_scale$", "clip.logit_scale"),
    (r"^prompt_cube$", "clip.vision_model.encoder.prompt_embedding"),
    (r"^aggregation\.", "clip.vision_model.attn."),
    (r"(layers\.\d+)\.ln_([12])\.", r"\1.layer_norm\2."),
    (r"(layers\.\d+)\.mlp\.c_fc\.", r"\1.mlp.fc1."),
    (r"(layers\.\d+)\.mlp\.c_proj\.", r"\1.mlp.fc2."),
    (r"(layers\.\d+)\.attn\.", r"\1.self_attn."),
    (r"^captioner\.decoder\.", "caption_transformer."),
    (r"^captioner\.(prenorm|head)\.", r"caption_\1."),
)
Values = dict[str, Tensor]


def golden(name: str) -> tuple[Golden, Values]:
    return read(GOLDEN / f"{name}.npz")


def backbone_of(sizes: dict, folder: Path) -> str:
    path = folder / "sizes.json"
    path.write_text(json.dumps(clip_sizes(sizes, {}, {})))
    return str(path)


def as_prompt_switch(values: Values) -> Values:
    """The names of the official code, which stands on transformers' CLIP."""
    named: Values = {}
    projection = {"text_projection": values["text_projection"].T, "visual_projection": values["visual.proj"].T}
    for name, value in {**values, **projection}.items():
        if name == "visual.proj":
            continue
        for pattern, theirs in TRANSFORMERS:
            name = re.sub(pattern, theirs, name)
        if "self_attn.in_proj_" in name and name.startswith("clip."):
            for part, piece in zip("qkv", value.chunk(3), strict=True):
                named[name.replace("in_proj_", f"{part}_proj.")] = piece.clone()
        else:
            named[name] = value
    for tower in ("text", "vision"):
        named[f"clip.{tower}_model.embeddings.position_ids"] = torch.arange(4)[None]
    return named


def loaded(url: Path | str) -> models.Retriever:
    return weights.load_run(str(url))[1].double()


def assert_same(found: Tensor, reference: Tensor) -> None:
    torch.testing.assert_close(found, reference, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["promptswitch_square", "promptswitch_chunked"])
def test_prompt_switch(name: str, tmp_path: Path) -> None:
    (sizes, values, inputs), references = golden(name)
    broken = {key: value + 1 for key, value in values.items()}
    state = {"epoch": 3, "state_dict": as_prompt_switch(broken), "state_dict_ema": as_prompt_switch(values)}
    torch.save(state, tmp_path / "model_best.pth")
    backbone = backbone_of(sizes, tmp_path)
    import_official(str(tmp_path / "model_best.pth"), str(tmp_path / "out"), [f"model.backbone={backbone}"])
    model, config = loaded(tmp_path / "out"), weights.load_config(str(tmp_path / "out"))
    assert (config.model.num_prompts, config.model.captioner.layers) == (sizes["prompts"], sizes["cap_layers"])
    video = model.encode_video(inputs["video"].double())
    assert_same(video.vector_BD, references["out.video_features"])
    assert_same(model.encode_text(inputs["text"]).vector_TD, references["out.text_features"])
    assert_same(model(inputs["video"].double(), inputs["text"]).caption_logits_KV, references["out.caption_logits"])


def test_vop_of_the_port(tmp_path: Path) -> None:
    (sizes, values, inputs), references = golden("vop")
    towers = {k: v for k, v in values.items() if not k.endswith("_prompts")}
    state = {f"module.clip.{name}": value for name, value in towers.items()}
    state |= {f"module.image_encoder.{k.removeprefix('visual.')}": v for k, v in towers.items() if k[:7] == "visual."}
    text = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
    state |= {f"module.text_encoder.{name}": value for name, value in towers.items() if name.startswith(text)}
    state["module.visual_prompt_learner.visual_prompts"] = values["visual_prompts"]
    state["module.text_prompt_learner.text_prompts"] = values["text_prompts"]
    torch.save({"state_dict": state}, tmp_path / "VoP_msrvtt9k.pth")
    backbone = f"model.backbone={backbone_of(sizes, tmp_path)}"
    for overrides, end in (([], ""), (["model.text_suffix=0"], "_prefix_only")):
        url = import_official(str(tmp_path / "VoP_msrvtt9k.pth"), str(tmp_path / f"out{end}"), [backbone, *overrides])
        model = loaded(url)
        assert_same(model.encode_text(inputs["text"]).vector_TD, references[f"out.text_features{end}"])
        found = model.encode_video(inputs["video"].double())
        assert_same(normalize(found.frames_BFD, dim=-1), references["out.frame_features"])
    assert weights.load_config(url).model.max_tokens == sizes["ctx"] - 8
    state["module.image_encoder.proj"] = state["module.image_encoder.proj"] + 1
    torch.save({"state_dict": state}, tmp_path / "VoP_msrvtt9k.pth")
    with pytest.raises(ConfigError, match=r"image_encoder.proj has no place"):
        import_official(str(tmp_path / "VoP_msrvtt9k.pth"), str(tmp_path / "out2"), [backbone])


@pytest.mark.parametrize("head", ["meanP", "seqTransf"])
def test_clip4clip(head: str, tmp_path: Path) -> None:
    (sizes, values, inputs), references = golden("clip4clip")
    text = {"embed": sizes["dim"], "text_width": sizes["dim"], "text_heads": sizes["heads"], "text_layers": 2}
    image = {"width": 8, "layers": 1, "heads": 1, "image": 8, "patch": 8, "vocab": 2, "ctx": sizes["positions"]}
    torch.manual_seed(0)
    clip = clip_from_config(clip_sizes({**text, **image}, {}, {})).state_dict()
    state = {f"clip.{name}": value for name, value in {**clip, "logit_scale": values["logit_scale"]}.items()}
    if head == "seqTransf":
        state |= {name: value for name, value in values.items() if name != "logit_scale"}
    torch.save(state, tmp_path / "pytorch_model.bin.4")
    backbone = f"model.backbone={backbone_of({**text, **image}, tmp_path)}"
    model = loaded(import_official(str(tmp_path / "pytorch_model.bin.4"), str(tmp_path / "out"), [backbone]))
    mask, frames_BFD = inputs["video_mask"], inputs["frame_features"].double()
    mean_BD = model.pooled(model.in_context(frames_BFD, mask), mask)
    assert_same(mean_BD, references[f"out.{head}.video_mean"])
    text_TD = normalize(inputs["text_features"].double(), dim=-1)
    similarity = model.clip.logit_scale.exp() * text_TD @ normalize(mean_BD, dim=-1).T
    assert_same(similarity, references[f"out.{head}.similarity"])
    assert_same(model.clip.visual.proj, clip["visual.proj"].double())


def test_openais_clip_and_its_sizes_among_the_weights(tmp_path: Path, s3: str) -> None:
    (sizes, values, inputs), references = golden("clipvip")
    towers = {k: v for k, v in values.items() if k not in ("visual.added_cls", "visual.temporal_embedding")}
    given = {"input_resolution": torch.tensor(24), "vocab_size": torch.tensor(120), "context_length": torch.tensor(16)}
    torch.save({**towers, **given}, tmp_path / "clip.pt")
    storage.publish(tmp_path / "clip.pt", f"{s3}/official/clip.pt")
    backbone = f"model.backbone={backbone_of(sizes, tmp_path)}"
    finished = run("training.import_official", f"{s3}/official/clip.pt", f"{s3}/imported/clip", backbone)
    assert finished.code == 0, finished.err
    url = finished.out.strip()
    model, config = loaded(url), weights.load_config(url)
    assert_same(model.encode_text(inputs["text"]).vector_TD, references["out.text_features"])
    expected = model.clip.encode_image(inputs["video"][0].double())
    assert_same(model.encode_video(inputs["video"].double()).frames_BFD[0], expected)
    assert (config.model.name, config.run.name, weights.run_url(config)) == ("mean_pool", "clip", url)


@pytest.mark.parametrize("name", OPENAI)
def test_openais_backbones_are_found_by_their_sizes(name: str) -> None:
    with torch.device("meta"):
        state = build_clip(name, None).state_dict()
    assert _backbone({f"clip.{key}": value for key, value in state.items()}, "FILE") == name


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    (sizes, values, _), _ = golden("promptswitch_square")
    towers = {k: v for k, v in values.items() if k.split(".")[0] not in ("captioner", "prompt_cube", "aggregation")}
    backbone = f"model.backbone={backbone_of(sizes, tmp_path)}"
    file, output = str(tmp_path / "clip.pt"), str(tmp_path / "out")

    def refused(state: object, message: str, overrides: list[str]) -> None:
        torch.save(state, file)
        with pytest.raises(ConfigError, match=message):
            import_official(file, output, overrides)

    refused(towers, "sizes of none of ViT-B-32-quickgelu", [])
    refused({k: v for k, v in towers.items() if k != "ln_final.bias"}, "clip.ln_final.bias is missing", [backbone])
    refused({**towers, "more": torch.zeros(1)}, "clip.more has no place", [backbone])
    refused({**towers, "ln_final.bias": torch.zeros(3)}, r"clip.ln_final.bias is \[3\] instead of \[48\]", [backbone])
    refused({"weight": torch.zeros(1)}, "no checkpoint of OpenAI's CLIP, CLIP4Clip, Prompt Switch or VoP", [])
    refused([1, 2], "holds no state dict, but a list", [])
    refused({"state_dict": Path("x")}, "cannot be read as tensors and plain data", [])  # pickled code
    assert not Path(output).exists()
    assert_refused(run("training.import_official", "x"), "expected a file and an output, got 1 arguments")
    assert_refused(run("training.import_official", str(tmp_path / "no.pt"), output), "no.pt", "does not exist")
