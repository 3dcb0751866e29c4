"""Metrics against naive ones on whole matrices: captions, equal sentences, ties, chunks, dual softmax, stages."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from common.config import apply
from common.errors import ConfigError, RunError
from common.shards import Caption, SampleInfo
from training import metrics, ranking
from training.config import EvalConfig
from training.encode import measure
from training.metrics import Features, summary

Matrix = np.ndarray


def infos_of(captions: Sequence[Sequence[str]], sources: Sequence[str] | None = None) -> list[SampleInfo]:
    """One video per list of captions."""
    return [
        SampleInfo(
            video_id=str(i),
            source_id=sources[i] if sources else str(i),
            captions=[Caption(id=f"{i}#{n}", text=text) for n, text in enumerate(texts)],
            duration_s=1.0,
            fps=1.0,
            num_frames=1,
            width=8,
            height=8,
        )
        for i, texts in enumerate(captions)
    ]


def infos(*sources: str) -> list[SampleInfo]:
    return infos_of([[f"caption {i}"] for i in range(len(sources))], sources)


def found(text: Matrix, video: Matrix, captions: Sequence[Sequence[str]], **config: object) -> dict[str, float]:
    features = (Features(torch.as_tensor(x)) for x in (text, video))
    return measure(*features, infos_of(captions), apply(EvalConfig(), config)).metrics


def naive_rank(scores: Sequence[float], right: set[int]) -> float:
    best = max(scores[i] for i in right)
    wrong = [s for i, s in enumerate(scores) if i not in right]
    return 1 + sum(s > best for s in wrong) + sum(s == best for s in wrong) / 2


def naive(by_text: Matrix, by_video: Matrix, captions: Sequence[Sequence[str]], shared: bool) -> dict[str, float]:
    """From the scores TV by which captions, and by which videos, rank."""
    owner = [v for v, texts in enumerate(captions) for _ in texts]
    sentences = [text for texts in captions for text in texts]
    videos = range(len(captions))
    t2v, v2t = [], []
    for i, scores in enumerate(by_text):
        right = {v for v in videos if sentences[i] in captions[v]} if shared else {owner[i]}
        t2v.append(naive_rank(list(scores), right))
    for v in videos:
        groups = [max(by_video[i, v] for i, o in enumerate(owner) if o == g) for g in videos]
        v2t.append(naive_rank(groups, {g for g in videos if set(captions[g]) & set(captions[v])} if shared else {v}))
    expected = {}
    for prefix, ranks in (("", np.array(t2v)), ("v2t_", np.array(v2t))):
        recalls = {f"{prefix}r{k}": 100 * np.mean(ranks <= k) for k in (1, 5, 10, 50)}
        rsum = sum(recalls[f"{prefix}r{k}"] for k in (1, 5, 10))
        rest = {f"{prefix}mdr": np.median(ranks), f"{prefix}mnr": np.mean(ranks), f"{prefix}rsum": rsum}
        expected |= {**recalls, **rest}
    return expected


def softmax(x: Matrix, axis: int) -> Matrix:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


Case = tuple[Matrix, Matrix, list[list[str]]]


@st.composite
def cases(draw: Callable) -> Case:
    """Texts, videos and captions; small whole numbers, so that ties are frequent and products exact."""
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    counts = [int(random.integers(1, draw(st.integers(1, 3)) + 1)) for _ in range(draw(st.integers(2, 7)))]
    captions = [[f"sentence {random.integers(sum(counts))}" for _ in range(count)] for count in counts]
    return *(random.integers(-1, 2, (n, 3)).astype(np.float32) for n in (sum(counts), len(counts))), captions


chunks = st.sampled_from([1, 5, 10**6])


@given(cases(), chunks, st.booleans())
def test_chunked_metrics_equal_naive_ones(case: Case, chunk: int, shared: bool):
    text, video, captions = case
    scores = text @ video.T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "CHUNK_SCORES", chunk)
        result = found(text, video, captions, shared_captions=shared)
    assert result.pop("num_videos") == len(captions)
    assert result == pytest.approx(naive(scores, scores, captions, shared))


@given(cases(), chunks, st.sampled_from([0.01, 0.5]))
def test_a_dual_softmax_in_two_passes_equals_that_of_the_matrix(case: Case, chunk: int, temperature: float):
    """Seen to fail with the softmax over the other axis, and with the first pass left at its first chunk."""
    text, video, captions = case
    scores = (text @ video.T).astype(np.float64)
    by_text = scores * softmax(scores / temperature, axis=0)  # an item's weights over all captions, the queries
    by_video = scores * softmax(scores / temperature, axis=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "CHUNK_SCORES", chunk)
        rows = (torch.tensor(scores), torch.tensor(scores.T))
        weighted = [ranking.dual_softmax(x.__getitem__, *x.shape, temperature)(slice(0, len(x))).numpy() for x in rows]
        result = found(text, video, captions, dsl_temperature=temperature)
    np.testing.assert_allclose(weighted[0], by_text, rtol=1e-12)
    np.testing.assert_allclose(weighted[1], by_video.T, rtol=1e-12)
    expected = naive(weighted[0], weighted[1].T, captions, shared=True)  # exact ties as they are computed
    assert {k.removeprefix("dsl_"): v for k, v in result.items() if k.startswith("dsl_")} == pytest.approx(expected)
    plain = found(text, video, captions)
    assert {k: v for k, v in result.items() if not k.startswith("dsl_")} == plain


def test_a_dual_softmax_lets_an_item_that_all_queries_like_go():
    text = np.array([[1.0, 0.9], [0, 1.0]], np.float32)  # both like the second video; the first is only its own's
    video = np.array([[0.85, 0], [0, 1.0]], np.float32)
    result = found(text, video, [["a"], ["b"]], dsl_temperature=0.05)
    assert result["r1"] == 50 and result["dsl_r1"] == 100


@given(cases(), chunks, st.integers(1, 8))
def test_two_stages_equal_naive_ones(case: Case, chunk: int, top: int):
    """Seen to fail without the border's ties, and with the others shifted in front of the candidates."""
    text, video, captions = case
    random = np.random.default_rng(top)
    other_text, other_video = (random.integers(-1, 2, (len(x), 2)).astype(np.float32) for x in (text, video))
    first, second = text @ video.T, other_text @ other_video.T

    def staged(first_N: Matrix, second_N: Matrix) -> Matrix:
        """A score that orders by: a candidate or not, then its stage's score."""
        border = sorted(first_N)[-min(top, len(first_N))]
        return np.where(first_N >= border, 1000 + second_N, first_N)

    by_text = np.stack([staged(*rows) for rows in zip(first, second, strict=True)])
    by_video = np.stack([staged(*rows) for rows in zip(first.T, second.T, strict=True)]).T
    config = EvalConfig(rerank_top=top)
    texts, videos = (Features(*map(torch.as_tensor, pair)) for pair in ((other_text, text), (other_video, video)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "CHUNK_SCORES", chunk)
        result = measure(texts, videos, infos_of(captions), config).metrics
    expected = naive(by_text, by_video, captions, shared=True)
    expected |= {f"first_{name}": value for name, value in naive(first, first, captions, shared=True).items()}
    assert result.pop("num_videos") == len(captions)
    assert result == pytest.approx(expected)
    if top >= len(text):
        full = found(other_text, other_video, captions)
        assert {name: result[name] for name in result if not name.startswith("first_")} == {
            name: value for name, value in full.items() if name != "num_videos"
        }


def test_a_video_is_found_by_its_best_caption_among_the_other_videos_best():
    """The field's rule (CLIP4Clip, X-Pool, Prompt Switch). Another counts every wrong caption: only R@1 is the same."""
    video = np.eye(3, dtype=np.float32)
    text = np.array([[0.5, 0, 0], [0.1, 0, 0], [0.9, 1, 0], [0.8, 0, 0], [0.7, 0, 0], [0, 0, 1]], np.float32)
    captions = [["a", "b"], ["c", "d", "e"], ["f"]]
    result = found(text, video, captions)
    # Video 0: its best caption scores 0.5, behind video 1's best (0.9), or behind three captions of video 1.
    assert result["v2t_mnr"] == pytest.approx((2 + 1 + 1) / 3)
    every_caption = [naive_rank(list(text[:, 0]), {0, 1}), 1, 1]
    assert np.mean(every_caption) == pytest.approx((4 + 1 + 1) / 3)
    assert result["v2t_r1"] == pytest.approx(100 * np.mean(np.array(every_caption) == 1))


def test_a_model_that_scores_all_the_same_gets_the_rank_of_chance():
    result = found(np.ones((99, 4)), np.ones((99, 4)), [[str(i)] for i in range(99)], dsl_temperature=0.1)
    for prefix in ("", "v2t_", "dsl_", "dsl_v2t_"):
        assert result[f"{prefix}mdr"] == result[f"{prefix}mnr"] == 50
        assert result[f"{prefix}r1"] == 0


def test_videos_with_the_same_sentence_are_right_answers_for_each_other_unless_told_otherwise():
    text = np.array([[1.0, 0], [1, 0], [0, 1]])
    video = np.array([[0.8, 0.6], [1, 0], [0, 1]])
    result = found(text, video, [["a"], ["a"], ["b"]])
    assert result["r1"] == result["v2t_r1"] == 100
    assert found(text, video, [["a"], ["c"], ["b"]])["r1"] == pytest.approx(100 * 2 / 3)
    assert found(text, video, [["a"], ["a"], ["b"]], shared_captions=False)["r1"] == pytest.approx(100 * 2 / 3)


@given(st.lists(st.tuples(st.sampled_from([1, 1.5, 2, 7, 30, 60]), st.integers(0, 3)), min_size=1))
def test_counted_queries_are_as_good_as_repeated_ones(pairs: list[tuple[float, int]]):
    """What the bootstrap builds on."""
    ranks, counts = np.array([r for r, _ in pairs]), np.array([c for _, c in pairs])
    if counts.any():
        repeated = np.repeat(ranks, counts)
        expected = {f"r{k}": 100 * np.mean(repeated <= k) for k in (1, 5, 10, 50)}
        expected |= {"mdr": np.median(repeated), "mnr": np.mean(repeated)}
        expected["rsum"] = expected["r1"] + expected["r5"] + expected["r10"]
        assert summary(ranks, counts) == pytest.approx(expected)


def test_order_score_counts_wins_ties_and_losses():
    text = torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 0], [1, 0], [1, 0]])
    video = torch.tensor([[0.9, 0], [0.1, 0], [0.5, 0], [0.5 + 5e-7, 0], [0.3, 0], [0, 0]])
    order = metrics.order(Features(text), Features(video), infos("a", "a", "b", "b", "alone", "c"))
    assert order.metrics() == {"order": pytest.approx((1 + 0 + 0.5 + 0.5) / 4)}
    assert order.videos_Q.tolist() == [0, 1, 2, 3]


def test_vectors_that_are_not_finite_are_no_perfect_score():
    vectors = Features(torch.eye(2))
    assert measure(vectors, vectors, infos("a", "b"), EvalConfig()).metrics["r1"] == 100
    for broken in (float("nan"), float("inf")):
        with pytest.raises(RunError, match=r"not finite.*lower optim\.lr"):
            measure(vectors, Features(torch.full((2, 2), broken)), infos("a", "b"), EvalConfig())
    one = torch.tensor([[1.0, float("nan")], [0.0, 1.0]])  # of a scorer
    with pytest.raises(RunError, match=r"not finite.*lower optim\.lr"):
        measure(vectors, vectors, infos("a", "b"), EvalConfig(), lambda texts, videos: one)


def test_an_order_score_needs_twins():
    vectors, config = Features(torch.eye(2)), EvalConfig(twins=True)
    with pytest.raises(ConfigError, match=r"eval\.twins=true, but no source_id has exactly two videos"):
        measure(vectors, vectors, infos("a", "b"), config)
    assert measure(vectors, vectors, infos("a", "a"), config).metrics["order"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"select": "dsl_r1"}, r"reads all queries before it answers one, so it selects no weights"),
        ({"rerank_top": 5, "dsl_temperature": 0.01}, r"eval\.dsl_temperature needs the scores of all pairs"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        apply(EvalConfig(), changes)
