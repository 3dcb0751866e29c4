"""One self-contained HTML page: a query, and the videos found with their frames inlined. Opens offline."""

import html

from common import page
from retrieval.result import Hit, Result

CAPTIONS = 3  # shown per video; the rest is counted

CSS = """
.score { min-width: 3.4em; text-align: right; font-variant-numeric: tabular-nums; font-weight: 600 }
.bar { width: 110px; height: 6px; border-radius: 3px; background: var(--line); overflow: hidden; align-self: center }
.bar i { display: block; height: 100%; background: var(--accent) }
.was { color: var(--soft); font-size: 13px; white-space: nowrap; font-variant-numeric: tabular-nums }
.captions { margin: 10px 0 0 }
.generated { margin: 10px 0 -4px }
.generated small { display: inline-block; min-width: 3.6em; color: var(--soft) }
.captions small { color: var(--soft) }
"""


def render(result: Result, images: list[list[bytes]]) -> str:
    """The page for a result; `images` holds each hit's JPEGs, in the order of the hits."""
    items = "\n".join(
        _item(hit, jpegs, result.rerank is not None) for hit, jpegs in zip(result.hits, images, strict=True)
    )
    query = html.escape(result.query)
    second = result.rerank
    score, scored = "cosine similarity of query and video", ""
    if second:
        score = f"that of {html.escape(second.scorer)}, which reads query and video together"
        scored = f", ordered by {html.escape(second.scorer)} among the best {second.videos:,} of the index"
    captions = " Beside “model”: what a caption head wrote." if result.captions else ""
    sources = {"Run": result.run, "dataset": result.dataset, "index": result.index, "captions": result.captions}
    sources |= {"re-ranking run": second.run, "features": second.features} if second else {}
    made_from = " · ".join(f"{name} {html.escape(url)}" for name, url in sources.items() if url)
    body = f"""<header>
<h1>“{query}”</h1>
<p>The best {len(result.hits)} of {result.videos:,} videos in the split {html.escape(result.split)}{scored}</p>
</header>
<ol>
{items}
</ol>
<footer>
<p>Score: {score}. Frames: evenly spaced in time, left to right; the centre square.
Captions: the data's own, not seen by the search.{captions}</p>
<p>{made_from}</p>
</footer>"""
    return page.render(result.query, body, CSS)


def _item(hit: Hit, jpegs: list[bytes], is_reranked: bool) -> str:
    shown = "<br>".join(html.escape(caption) for caption in hit.captions[:CAPTIONS])
    more = len(hit.captions) - CAPTIONS
    hidden = f" <small>and {more} more</small>" if more > 0 else ""
    was = f'<span class="was">index: rank {hit.index_rank}, {hit.index_score:.3f}</span>\n' if is_reranked else ""
    says = (
        "" if hit.generated is None else f'<p class="generated"><small>model</small>{html.escape(hit.generated)}</p>\n'
    )
    return f"""<li>
<div class="head"><span class="rank">{hit.rank}</span><span class="id">{html.escape(hit.video_id)}</span>
{was}<span class="bar"><i style="width:{100 * max(hit.score, 0):.1f}%"></i></span>
<span class="score">{hit.score:.3f}</span></div>
{page.strip(jpegs)}
{says}<p class="captions">{shown}{hidden}</p>
</li>"""
