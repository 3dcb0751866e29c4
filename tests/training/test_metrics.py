"""Metrics against naive ones: several captions, equal sentences, ties, chunks, twins."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError, RunError
from common.shards import Caption, SampleInfo
from training import metrics
from training.config import EvalConfig
from training.encode import score


def naive_rank(scores: list[float], right: set[int]) -> float:
    best = max(scores[i] for i in right)
    wrong = [s for i, s in enumerate(scores) if i not in right]
    return 1 + sum(s > best for s in wrong) + sum(s == best for s in wrong) / 2


def naive(text: np.ndarray, video: np.ndarray, texts: list[str], owner: list[int]) -> tuple[list[float], list[float]]:
    scores = text @ video.T
    sentences = {v: {t for t, o in zip(texts, owner, strict=True) if o == v} for v in range(len(video))}
    t2v = [naive_rank(list(scores[i]), {v for v in sentences if texts[i] in sentences[v]}) for i in range(len(texts))]
    v2t = []
    for v in range(len(video)):
        groups = [max(scores[i, v] for i, o in enumerate(owner) if o == g) for g in range(len(video))]
        v2t.append(naive_rank(groups, {g for g in sentences if sentences[g] & sentences[v]}))
    return t2v, v2t


@given(st.integers(0, 10**6), st.integers(2, 7), st.integers(1, 3), st.sampled_from([1, 5, 10**6]))
def test_chunked_metrics_equal_naive_ones(seed: int, videos: int, captions: int, chunk: int):
    random = np.random.default_rng(seed)
    owner = [v for v in range(videos) for _ in range(random.integers(1, captions + 1))]
    random.shuffle(owner)
    owner += [v for v in range(videos) if v not in owner]
    texts = [f"sentence {random.integers(len(owner))}" for _ in owner]
    # Small integers make ties frequent and the products exact.
    text, video = (random.integers(-1, 2, (n, 3)).astype(np.float32) for n in (len(owner), videos))
    t2v, v2t = naive(text, video, texts, owner)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "CHUNK_SCORES", chunk)
        found = metrics.retrieval_metrics(torch.from_numpy(text), torch.from_numpy(video), texts, owner)
    for prefix, ranks in (("", t2v), ("v2t_", v2t)):
        assert found[f"{prefix}r1"] == pytest.approx(100 * np.mean(np.array(ranks) <= 1))
        assert found[f"{prefix}r5"] == pytest.approx(100 * np.mean(np.array(ranks) <= 5))
        assert found[f"{prefix}mdr"] == pytest.approx(np.median(ranks))
        assert found[f"{prefix}mnr"] == pytest.approx(np.mean(ranks))


def test_a_model_that_scores_all_the_same_gets_the_rank_of_chance():
    found = metrics.retrieval_metrics(torch.ones(99, 4), torch.ones(99, 4), [str(i) for i in range(99)], range(99))
    assert found["mdr"] == found["mnr"] == 50
    assert found["r1"] == 0


def test_videos_with_the_same_sentence_are_right_answers_for_each_other():
    text = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    video = torch.tensor([[0.8, 0.6], [1, 0], [0, 1]])
    found = metrics.retrieval_metrics(text, video, ["a", "a", "b"], [0, 1, 2])
    assert found["r1"] == found["v2t_r1"] == 100
    assert metrics.retrieval_metrics(text, video, ["a", "c", "b"], [0, 1, 2])["r1"] == pytest.approx(100 * 2 / 3)


def test_order_score_counts_wins_ties_and_losses():
    text = torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 0], [1, 0], [1, 0]])
    video = torch.tensor([[0.9, 0], [0.1, 0], [0.5, 0], [0.5 + 5e-7, 0], [0.3, 0], [0, 0]])
    sources = ["a", "a", "b", "b", "alone", "c"]
    assert metrics.order_score(text, video, range(6), sources) == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)


def infos(*sources: str) -> list[SampleInfo]:
    return [
        SampleInfo(
            video_id=str(i),
            source_id=source,
            captions=[Caption(id=f"{i}#0", text=f"caption {i}")],
            duration_s=1.0,
            fps=1.0,
            num_frames=1,
            width=8,
            height=8,
        )
        for i, source in enumerate(sources)
    ]


def test_vectors_that_are_not_finite_are_no_perfect_score():
    vectors = torch.eye(2)
    assert score([vectors], [vectors], infos("a", "b"), EvalConfig())["r1"] == 100
    for broken in (float("nan"), float("inf")):
        with pytest.raises(RunError, match=r"not finite.*lower optim\.lr"):
            score([vectors], [torch.full((2, 2), broken)], infos("a", "b"), EvalConfig())


def test_an_order_score_needs_twins():
    with pytest.raises(ConfigError, match=r"eval\.twins=true, but no source_id has exactly two videos"):
        score([torch.eye(2)], [torch.eye(2)], infos("a", "b"), EvalConfig(twins=True))
    assert score([torch.eye(2)], [torch.eye(2)], infos("a", "a"), EvalConfig(twins=True))["order"] == 1
