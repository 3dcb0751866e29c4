"""One self-contained HTML page: a query, and the videos found with their frames inlined. Opens offline."""

import html

from common import page
from retrieval.result import Hit, Result

CAPTIONS = 3  # shown per video; the rest is counted

CSS = """
.score { min-width: 3.4em; text-align: right; font-variant-numeric: tabular-nums; font-weight: 600 }
.bar { width: 110px; height: 6px; border-radius: 3px; background: var(--line); overflow: hidden; align-self: center }
.bar i { display: block; height: 100%; background: var(--accent) }
.captions { margin: 10px 0 0 }
.captions small { color: var(--soft) }
"""


def render(result: Result, images: list[list[bytes]]) -> str:
    """The page for a result; `images` holds each hit's JPEGs, in the order of the hits."""
    items = "\n".join(_item(hit, jpegs) for hit, jpegs in zip(result.hits, images, strict=True))
    query = html.escape(result.query)
    body = f"""<header>
<h1>“{query}”</h1>
<p>The best {len(result.hits)} of {result.videos:,} videos in the split {html.escape(result.split)}</p>
</header>
<ol>
{items}
</ol>
<footer>
<p>Score: cosine similarity of query and video. Frames: evenly spaced in time, left to right; the centre square.
Captions: the data's own, not seen by the search.</p>
<p>Run {html.escape(result.run)} · dataset {html.escape(result.dataset)} · index {html.escape(result.index)}</p>
</footer>"""
    return page.render(result.query, body, CSS)


def _item(hit: Hit, jpegs: list[bytes]) -> str:
    shown = "<br>".join(html.escape(caption) for caption in hit.captions[:CAPTIONS])
    more = len(hit.captions) - CAPTIONS
    hidden = f" <small>and {more} more</small>" if more > 0 else ""
    return f"""<li>
<div class="head"><span class="rank">{hit.rank}</span><span class="id">{html.escape(hit.video_id)}</span>
<span class="bar"><i style="width:{100 * max(hit.score, 0):.1f}%"></i></span>
<span class="score">{hit.score:.3f}</span></div>
{page.strip(jpegs)}
<p class="captions">{shown}{hidden}</p>
</li>"""
