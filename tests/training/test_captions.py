"""The caption head at work: the search against all sentences there are, whole runs on Ray, and what is refused."""

import itertools
import json
from pathlib import Path

import pytest
import ray
import torch

from common import config as configs
from common import shards, storage
from common.config import apply, dump
from common.errors import ConfigError
from tests.entry import assert_refused, run
from training import models, weights
from training.beam_search import write
from training.caption import caption_run
from training.caption_metrics import caption_metrics
from training.config import PRESETS, CaptionConfig, CaptionRun, TrainConfig
from training.data.loader import eval_loader, open_cache
from training.encode import encode_views
from training.model_config import MeanPoolConfig
from training.models import clip as clip_tower

START, END = 4, 5
SIZES = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 7, "vocab_size": END + 1, "width": 24, "heads": 2, "layers": 1},
}
ODD = {"bleu4": 52.06811252396829, "cider": 282.6725463350751}
GREEDY = CaptionConfig(beams=1, max_tokens=6, length_penalty=0)
FRAMES = torch.randn(3, 2, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def towers(seed: int = 0) -> models.TwoTower:
    """Four words, start and end; a head that is sure enough of itself for orders to differ."""
    torch.manual_seed(seed)
    config = MeanPoolConfig(backbone="given", captioner={"layers": 2})
    model = models.MODELS["mean_pool"](config, clip_tower.clip_from_config(SIZES)).double().eval()
    assert model.captioner is not None
    model.captioner.head.weight.data.normal_()
    return model


def log_probability(model: models.TwoTower, sentence: tuple[int, ...], frames_1FD: torch.Tensor) -> float:
    """Of a whole sentence, word by word, as the loss has it: all positions at once."""
    tokens_1L = torch.tensor([[START, *sentence, END]])
    with torch.no_grad():
        logits = model.captioner.head(model.captioner(model.clip, tokens_1L[:, :-1], frames_1FD))
    return float(logits.log_softmax(-1).gather(2, tokens_1L[:, 1:, None]).sum())


@pytest.mark.parametrize("penalty", [0.0, 0.5, 1.0, 2.0])
def test_with_room_for_all_hypotheses_the_best_sentence_of_all_is_found(penalty: float) -> None:
    """Seen to fail where what has ended is dropped or grows longer, and where a beam takes another parent's words."""
    model = towers()
    every = [s for n in range(5) for s in itertools.product(range(4), repeat=n)]
    found = write(model, FRAMES, START, END, CaptionConfig(beams=2000, max_tokens=6, length_penalty=penalty))
    for frames_FD, ids, score in zip(FRAMES, *found, strict=True):
        scores = {s: log_probability(model, s, frames_FD[None]) / (len(s) + 1) ** penalty for s in every}
        best = max(scores, key=lambda s: scores[s])
        assert tuple(ids) == best
        assert score == pytest.approx(scores[best], abs=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_one_beam_is_greedy(seed: int) -> None:
    model = towers(seed)
    sentences, _ = write(model, FRAMES, START, END, GREEDY)
    for frames_FD, ids in zip(FRAMES, sentences, strict=True):
        expected = [START]
        while len(expected) < 5:
            hidden = model.captioner(model.clip, torch.tensor([expected]), frames_FD[None])
            logits = model.captioner.head(hidden)[0, -1]
            logits[START] = -torch.inf
            if int(logits.argmax()) == END:
                break
            expected.append(int(logits.argmax()))
        assert ids == expected[1:]


@pytest.mark.parametrize("beams", [1, 3])
def test_a_caption_does_not_depend_on_those_beside_it(beams: int) -> None:
    """Seen to fail where hypotheses read another video's frames."""
    model, config = towers(1), GREEDY.model_copy(update={"beams": beams, "length_penalty": 1.0})
    sentences, scores = write(model, FRAMES, START, END, config)
    assert len({len(s) for s in sentences}) > 1, "those that end early wait for the others"
    alone = [write(model, frames_FD[None], START, END, config) for frames_FD in FRAMES]
    assert sentences == [s[0] for s, _ in alone]
    assert scores == pytest.approx([s[0] for _, s in alone], abs=1e-9)


def test_more_beams_find_no_worse_captions_and_scores_are_true() -> None:
    model = towers(2)
    scores = {}
    for beams in (1, 2, 4, 2000):
        sentences, scores[beams] = write(model, FRAMES, START, END, GREEDY.model_copy(update={"beams": beams}))
        true = [log_probability(model, tuple(s), f[None]) for s, f in zip(sentences, FRAMES, strict=True)]
        assert scores[beams] == pytest.approx(true, abs=1e-9)
    assert sum(scores[1]) < sum(scores[2000])
    assert all(few <= most + 1e-9 for few, most in zip(scores[4], scores[2000], strict=True))


def test_a_caption_ends_at_the_end_token_or_at_the_most_tokens() -> None:
    """Seen to fail where the last token may be another than the end, and where start is a word."""
    model = towers()
    model.captioner.head.bias.data[END] = 1e3
    assert write(model, FRAMES, START, END, GREEDY)[0] == [[], [], []]
    model.captioner.head.bias.data[END] = -1e3
    assert {len(s) for s in write(model, FRAMES, START, END, GREEDY)[0]} == {4}
    longer = GREEDY.model_copy(update={"max_tokens": 50})  # than the 7 positions of the text tower
    sentences, scores = write(model, FRAMES, START, END, longer)
    assert {len(s) for s in sentences} == {5}
    assert max(scores) < -900, "the end that it was made to say counts"
    model.captioner.head.bias.data[START] = 1e4
    assert not any(START in sentence for sentence in write(model, FRAMES, START, END, longer)[0])


@pytest.mark.parametrize("backbone", ["tiny", "ViT-B-32"])
def test_ids_are_read_back_as_the_sentence(backbone: str) -> None:
    for sentence in ("a red square moves, then it's gone!", "two zebras don't sleep for 10 hours.", "größe 大"):
        ids = models.tokenizer(backbone, 77)([sentence])[0].tolist()
        assert models.detokenizer(backbone)(ids[1:-1]) == sentence


def test_metrics_are_those_of_the_fields_program() -> None:
    """The figures are pycocoevalcap 1.2's of the same words (its Bleu and Cider, read as `split` has them)."""
    captions = ["a man is playing a guitar", "A dog runs on the beach.", "a red square moves from left to right"]
    references = [
        ["a man plays a guitar", "a man is playing the guitar on a stage"],
        ["a dog is running on the beach", "the dog runs along the sea"],
        ["a red square moves from right to left"],
    ]
    assert caption_metrics(captions, references) == pytest.approx(
        {"bleu4": 53.594599168802844, "cider": 414.6824175114591}, rel=1e-6
    )
    odd = caption_metrics(
        ["", "a a a a", "red", *captions], [["a cat"], ["a", "a a a"], ["red blue", "red"], *references]
    )
    assert odd == pytest.approx(ODD, rel=1e-6)
    assert caption_metrics(["a b"], [["c d"]]) == {"bleu4": 0, "cider": 0}


class TestOnRay:
    @pytest.fixture
    def config(self, ray_local: object, tiny: TrainConfig) -> CaptionRun:
        """A run of random weights, as training leaves it."""
        ray.init(ignore_reinit_error=True, log_to_driver=False)
        torch.manual_seed(0)
        weights.save_best(weights.run_url(tiny), models.build(tiny.model), 1, {})
        url = storage.join(weights.run_url(tiny), "config.yaml")
        storage.publish_bytes(dump(tiny).encode(), url)
        return configs.load(CaptionRun, url, ["captions.max_tokens=8", "captions.beams=2", "eval.views=2"])

    def test_all_workers_write_what_one_process_writes(self, config: CaptionRun) -> None:
        result = caption_run(apply(config, {"eval.batch_size": 3}))
        lines = [json.loads(line) for line in storage.read(result["captions"]).decode().splitlines()]
        _, model = weights.load_run(weights.run_url(config))
        dataset, sha256 = shards.read_dataset(config.data.dataset)
        start, end = models.tokenizer("tiny", 2)([""])[0].tolist()
        expected, references = {}, {}
        for batch in eval_loader(config, dataset, open_cache(config, sha256), "test", 0, 1):
            with torch.no_grad():
                frames_BFD = encode_views(model, batch.frames_BFCHW, 2).frames_BFD
            sentences, _ = write(model.towers, frames_BFD, start, end, config.captions)
            for info, ids in zip(batch.videos, sentences, strict=True):
                expected[info.video_id] = models.detokenizer("tiny")(ids)
                references[info.video_id] = [caption.text for caption in info.captions]
        assert [line["video_id"] for line in lines] == sorted(expected)
        assert {line["video_id"]: line["caption"] for line in lines} == expected
        assert result == json.loads(storage.read(f"{weights.run_url(config)}/captions/test.metrics.json"))
        assert result["dataset_sha256"] == sha256 and result["beams"] == 2 and result["videos"] == 8
        metrics = caption_metrics([expected[v] for v in sorted(expected)], [references[v] for v in sorted(expected)])
        assert {name: result[name] for name in metrics} == pytest.approx(metrics)


def test_a_run_without_a_caption_head_is_refused(tmp_path: Path) -> None:
    overrides = ["data.dataset=s3://x/y", "model.captioner=null", "losses.caption=0", "run.name=plain"]
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.yaml").write_text(dump(configs.load(TrainConfig, "tiny", overrides, PRESETS)))
    refused = run("training.caption", str(tmp_path / "plain"))
    assert_refused(refused, "run plain was trained with model.captioner=null", "give a run with model.captioner")
    with pytest.raises(ConfigError, match=r"captions.max_tokens=2: .*greater than or equal to 3"):
        configs.load(CaptionRun, "tiny", ["data.dataset=s3://x/y", "captions.max_tokens=2"], PRESETS)
    with pytest.raises(ConfigError, match=r"data.test=null names no split .* give data.test=SPLIT"):
        configs.load(CaptionRun, "tiny", ["data.dataset=s3://x/y", "data.test=null"], PRESETS)
