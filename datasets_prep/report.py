"""What is in a dataset, as one page that opens offline: totals, histograms, reasons of rejection, sample frames."""

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable, Mapping

from common import shards, storage
from common.shards import DatasetIndex, Histograms, SampleIndex, SampleInfo
from datasets_prep import histograms

NAME = "report.html"
TITLE = "<title>Dataset report</title>"
SAMPLES = 12
FRAMES = 4
TITLES = {
    "duration_s": "Duration, seconds",
    "num_frames": "Frames",
    "fps": "Frames per second",
    "short_side": "Shorter side, pixels",
    "caption_words": "Words in a caption",
    "captions": "Captions of a video",
}
CSS = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1c2430 }
h1 { font-size: 1.5rem } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: right }
td:first-child, th:first-child { text-align: left }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(20rem, 1fr)); gap: 1.5rem }
.bar { background: #3b6fb6; height: .75rem; display: inline-block; vertical-align: middle; min-width: 1px }
.plots td { white-space: nowrap } .plots td:last-child { text-align: left; width: 100%; color: #5a6675 }
.sample { display: flex; gap: 1rem; margin: .6rem 0; align-items: center }
.sample img { height: 96px; margin-right: 2px } .frames { white-space: nowrap }
.id { color: #5a6675; font-size: .85rem }
"""


def render(output: str, dataset: DatasetIndex, reasons: Mapping[str, int], parts: Iterable[Histograms]) -> str:
    """The page of a finished dataset; reads a few samples. Raises StorageError, DataError."""
    counts = histograms.add(parts)
    rows = [
        f"<tr><td>{html.escape(name)}<td>{len(s.shards):,}<td>{s.samples:,}<td>{s.captions:,}"
        f"<td>{sum(e.bytes for e in s.shards) / 1e6:,.1f}"
        for name, s in dataset.splits.items()
    ]
    plots = [f"<section><h2>{TITLES[name]}</h2>{_bars(counts[name])}</section>" for name in TITLES if counts.get(name)]
    rejected = "".join(
        f"<tr><td>{html.escape(reason)}<td>{count:,}" for reason, count in Counter(reasons).most_common()
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">{TITLE}
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{CSS}</style></head><body>
<h1>Dataset report</h1>
<table><tr><th>split<th>shards<th>videos<th>captions<th>MB{"".join(rows)}</table>
<h2>Rejected clips: {dataset.rejected:,}</h2>
<table>{rejected or "<tr><td>none"}</table>
<div class="plots">{"".join(plots)}</div>
<h2>Samples</h2>
{"".join(_samples(output, dataset))}
<p class="id">plan {dataset.plan_hash}</p>
</body></html>
"""


def _bars(counts: Mapping[str, int]) -> str:
    most = max(counts.values())
    rows = (
        f'<tr><td>from {edge}<td>{count:,}<td><span class="bar" style="width:{100 * count / most:.1f}%"></span>'
        for edge, count in counts.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _samples(output: str, dataset: DatasetIndex) -> Iterable[str]:
    """One sample of each of evenly spaced shards."""
    entries = [entry for split in dataset.splits.values() for entry in split.shards]
    chosen = sorted({i * len(entries) // SAMPLES for i in range(SAMPLES)})
    for number in chosen:
        name = entries[number].name
        for sample in shards.read_marker(output, name).samples[: max(1, SAMPLES // len(chosen))]:
            yield _sample(output, name, sample)


def _sample(output: str, shard: str, sample: SampleIndex) -> str:
    def member(suffix: str) -> bytes:
        return storage.read_range(storage.join(output, shard), *sample.members[suffix])

    info = sample.info or SampleInfo.model_validate_json(member("json"))
    pictures = sample.pictures
    is_video = not pictures[0].endswith("jpg")
    jpegs = _frames(member(pictures[0])) if is_video else [member(p) for p in pictures[:: -(-len(pictures) // FRAMES)]]
    images = "".join(f'<img alt="" src="data:image/jpeg;base64,{base64.b64encode(j).decode()}">' for j in jpegs)
    captions = "<br>".join(html.escape(c.text) for c in info.captions[:3])
    more = f'<br><span class="id">and {len(info.captions) - 3} more</span>' if len(info.captions) > 3 else ""
    about = f"{html.escape(shard)} · {html.escape(info.video_id)} · {info.duration_s:g} s · {info.width}×{info.height}"
    return (
        f'<div class="sample"><span class="frames">{images}</span>'
        f'<div>{captions}{more}<br><span class="id">{about}</span></div></div>'
    )


def _frames(video: bytes) -> list[bytes]:
    import decord  # opens threads: imported in the process that decodes
    from PIL import Image

    reader = decord.VideoReader(io.BytesIO(video), num_threads=1)
    indices = [(2 * i + 1) * len(reader) // (2 * FRAMES) for i in range(FRAMES)]
    jpegs = []
    for picture in reader.get_batch(indices).asnumpy():
        image = Image.fromarray(picture)
        image.thumbnail((240, 96))
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=80)
        jpegs.append(buffer.getvalue())
    return jpegs
