"""What a search found, and how a terminal shows it."""

from retrieval.embeddings import Record


class Hit(Record):
    """One found video. `score` is a cosine; `shard`, `offset` and `size` (bytes) place its mp4."""

    rank: int
    score: float
    video_id: str
    captions: list[str]
    shard: str
    offset: int
    size: int


class Result(Record):
    query: str
    index: str
    run: str
    dataset: str
    split: str
    videos: int
    hits: list[Hit]


def table(result: Result) -> str:
    """The result as text: rank, score, video_id, first caption."""
    width = max((len(hit.video_id) for hit in result.hits), default=0)
    lines = [f"{'rank':>4}  {'score':>6}  {'video':<{width}}  caption"]
    for hit in result.hits:
        more = f" (+{len(hit.captions) - 1})" if len(hit.captions) > 1 else ""
        first = hit.captions[0] if hit.captions else ""
        lines.append(f"{hit.rank:>4}  {hit.score:6.3f}  {hit.video_id:<{width}}  {first}{more}")
    return "\n".join(lines)
