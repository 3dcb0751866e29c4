"""Two-stage search over a split with models: who finds, who ranks."""

import pytest
import torch

from common.config import apply
from common.errors import ConfigError
from tests.training.test_methods import build, config_of, pixels
from tests.training.test_metrics import infos
from training import models
from training.config import EvaluateConfig
from training.data.loader import EvalBatch
from training.encode import encode_split, evaluate, evaluation

SCORED = "prompt_switch, xpool"
NAMES = "abcdefgh"


def given(method: str, **changes: object) -> tuple:
    """A model in training mode, as the loop's is, and what `evaluate` takes beside it."""
    config = config_of(method)
    frames = pixels(len(NAMES)).float()
    # Batches as of two ranks' loaders.
    batches = [EvalBatch(frames[:5], infos(*NAMES)[:5]), EvalBatch(frames[5:], infos(*NAMES)[5:])]
    model = build(method).float().train()
    return model, batches, models.tokenize(config.model), apply(config.eval, changes), torch.device("cpu")


def first_stage(found: dict[str, float]) -> dict[str, float]:
    return {name.removeprefix("first_"): value for name, value in found.items() if name.startswith("first_")}


def test_the_towers_own_vectors_find_and_the_scorer_ranks() -> None:
    """Seen to fail with the scorer in training mode (its dropout), and with its features as the first stage's."""
    full = evaluate(*given(SCORED))
    model, *rest = given(SCORED, rerank_top=len(NAMES))
    found = evaluate(model, *rest)
    assert {name: found[name] for name in full} == full and model.training
    alone = evaluate(model.towers, *given(SCORED)[1:])
    assert first_stage(found) == {name: value for name, value in alone.items() if name != "num_videos"}
    assert first_stage(found) != {name: full[name] for name in first_stage(found)}
    few = evaluate(*given(SCORED, rerank_top=2))
    assert first_stage(few) == first_stage(found)
    assert {name: few[name] for name in full} != full and {name: few[name] for name in alone} != alone


def test_another_run_may_find() -> None:
    other, batches, tokenize, config, device = given("seq_transf")
    first = encode_split(other.eval(), batches, tokenize, config.views, device)
    found = evaluation(*given(SCORED, rerank_top=2), first=first).metrics
    alone = evaluate(other, batches, tokenize, config, device)
    assert first_stage(found) == {name: value for name, value in alone.items() if name != "num_videos"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval.rerank_top": 5, "model.scorer": None}, r"eval\.rerank_top=5 needs model\.scorer: set it to null"),
        ({"recall": "s3://runs/other"}, r"recall needs eval\.rerank_top"),
        ({"templates": ["a video"]}, r"every template needs \{\}"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict, message: str) -> None:
    config = EvaluateConfig.model_validate(config_of(SCORED).model_dump())
    with pytest.raises(ConfigError, match=message):
        apply(config, changes)
