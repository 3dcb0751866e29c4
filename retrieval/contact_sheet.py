"""One self-contained HTML page: a query, and the videos found with their frames inlined. Opens offline."""

import html
import io
from base64 import b64encode

from PIL import Image

from common import shards, storage
from retrieval.result import Hit, Result
from training.data.decode import FrameSettings, decode_clip

FRAME_PIXELS = 160
CAPTIONS = 3  # shown per video; the rest is counted

CSS = """
:root { color-scheme: light dark; --line: #d9dde3; --soft: #667080; --card: #fff; --page: #f4f5f7; --ink: #1b1f24;
  --accent: #2563eb }
@media (prefers-color-scheme: dark) { :root { --line: #343a42; --soft: #97a1af; --card: #1d2126; --page: #14171a;
  --ink: #e7eaee; --accent: #6ea0ff } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1060px; padding: 32px 20px 48px; background: var(--page); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif }
h1 { margin: 0 0 4px; font-size: 26px; line-height: 1.25; text-wrap: balance }
header p, footer { margin: 0; color: var(--soft); font-size: 13px; overflow-wrap: anywhere }
ol { list-style: none; margin: 24px 0; padding: 0; display: grid; gap: 14px }
li { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px 14px }
.head { display: flex; align-items: baseline; gap: 12px; margin-bottom: 10px }
.rank { min-width: 1.1em; font-size: 20px; font-weight: 650; color: var(--accent) }
.id { flex: 1; color: var(--soft); font: 13px ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere }
.score { min-width: 3.4em; text-align: right; font-variant-numeric: tabular-nums; font-weight: 600 }
.bar { width: 110px; height: 6px; border-radius: 3px; background: var(--line); overflow: hidden; align-self: center }
.bar i { display: block; height: 100%; background: var(--accent) }
.strip { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: 4px }
.strip img { width: 100%; max-width: 160px; display: block; border-radius: 4px; background: #888 }
.was { color: var(--soft); font-size: 13px; white-space: nowrap; font-variant-numeric: tabular-nums }
.captions { margin: 10px 0 0 }
.generated { margin: 10px 0 -4px }
.generated small { display: inline-block; min-width: 3.6em; color: var(--soft) }
.captions small { color: var(--soft) }
footer { border-top: 1px solid var(--line); padding-top: 12px }
"""


def frames(dataset: str, shard: str, offset: int, size: int, count: int) -> list[bytes]:
    """`count` JPEGs, evenly spaced in time, of the clip at a byte range of a shard. Raises DataError, StorageError."""
    span = storage.read_range(storage.join(dataset, shard), offset, size)
    frames_FCHW = decode_clip(shards.pictures_in(span), FrameSettings(segments=count, chunks=1, size=FRAME_PIXELS))
    return [_jpeg(Image.fromarray(frame)) for frame in frames_FCHW.permute(0, 2, 3, 1).numpy()]


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


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
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{query}</title>
<style>{CSS}</style>
<header>
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
</footer>
</html>
"""


def _item(hit: Hit, jpegs: list[bytes], is_reranked: bool) -> str:
    images = "".join(
        f'<img alt="frame {n} of {len(jpegs)}" src="data:image/jpeg;base64,{b64encode(jpeg).decode()}">'
        for n, jpeg in enumerate(jpegs, 1)
    )
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
<div class="strip">{images}</div>
{says}<p class="captions">{shown}{hidden}</p>
</li>"""
