"""Counts per bin of what samples are like: each shard's go into its marker, so that nothing is read twice."""

from collections import Counter
from collections.abc import Iterable

from common.shards import Histograms, SampleInfo

# Upper bins are open. Fixed, so that the counts of any two shards can be added.
BINS: dict[str, list[float]] = {
    "duration_s": [0, 1, 2, 3, 4, 5, 7, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600, 1200],
    "num_frames": [1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768],
    "fps": [0, 5, 8, 10, 12, 15, 20, 24, 25, 29, 30, 31, 50, 60],
    "short_side": [0, 64, 96, 128, 160, 192, 224, 256, 257, 320, 480, 720],
    "caption_words": [0, 1, 2, 4, 6, 8, 10, 12, 15, 20, 25, 30, 40, 60, 77, 120],
    "captions": [1, 2, 3, 5, 10, 20, 21, 41, 81],
}


def of(infos: Iterable[SampleInfo]) -> Histograms:
    """The counts of these samples; `caption_words` counts captions, all others samples."""
    counts: dict[str, Counter[str]] = {quantity: Counter() for quantity in BINS}
    for info in infos:
        values: dict[str, list[float]] = {
            "duration_s": [info.duration_s],
            "num_frames": [info.num_frames],
            "fps": [info.fps],
            "short_side": [min(info.width, info.height)],
            "caption_words": [len(c.text.split()) for c in info.captions],
            "captions": [len(info.captions)],
        }
        for quantity, found in values.items():
            counts[quantity].update(_bin(quantity, value) for value in found)
    return {
        quantity: dict(sorted(count.items(), key=lambda item: float(item[0]))) for quantity, count in counts.items()
    }


def add(parts: Iterable[Histograms]) -> Histograms:
    """The counts of several shards together."""
    total: dict[str, Counter[str]] = {quantity: Counter() for quantity in BINS}
    for part in parts:
        for quantity, counts in part.items():
            total.setdefault(quantity, Counter()).update(counts)
    return {quantity: {b: count[b] for b in sorted(count, key=float)} for quantity, count in total.items()}


def _bin(quantity: str, value: float) -> str:
    return f"{max((edge for edge in BINS[quantity] if edge <= value), default=BINS[quantity][0]):g}"
