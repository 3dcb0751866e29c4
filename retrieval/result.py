"""What a search found, and how a terminal shows it."""

from typing import Literal

from retrieval.embeddings import Record


class Hit(Record):
    """One found video. `shard`, `offset` and `size` (bytes) place its pictures; `generated` is what a model says of it.

    `score` is that of the stage that ordered the hits: a cosine of the index, or a scorer's. `index_score` and
    `index_rank` are the index's own.
    """

    rank: int
    score: float
    video_id: str
    captions: list[str]
    shard: str
    offset: int
    size: int
    index_rank: int
    index_score: float
    generated: str | None = None


class Reranking(Record):
    """The second stage: `run`'s scorer ordered the `videos` best of the index."""

    features: str
    run: str
    scorer: str
    videos: int


class Result(Record):
    query: str
    index: str
    run: str
    dataset: str
    split: str
    videos: int
    scored_by: Literal["index", "rerank"] = "index"
    rerank: Reranking | None = None
    captions: str | None = None
    hits: list[Hit]


def table(result: Result) -> str:
    """The result as text: rank, score, video_id, first caption; after a re-ranking the rank in the index too."""
    width = max((len(hit.video_id) for hit in result.hits), default=0)
    index = "" if result.rerank is None else f"{'index':>5}  "
    lines = [f"{'rank':>4}  {'score':>6}  {index}{'video':<{width}}  caption"]
    for hit in result.hits:
        more = f" (+{len(hit.captions) - 1})" if len(hit.captions) > 1 else ""
        first = hit.captions[0] if hit.captions else ""
        index = "" if result.rerank is None else f"{hit.index_rank:>5}  "
        lines.append(f"{hit.rank:>4}  {hit.score:6.3f}  {index}{hit.video_id:<{width}}  {first}{more}")
    return "\n".join(lines)
