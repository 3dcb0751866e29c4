"""A few frames of a clip as JPEGs, for pages that people look at."""

import io
from collections.abc import Collection

from PIL import Image

from common import shards, storage
from common.shards import SplitIndex
from training.data.decode import FrameSettings, decode_clip

PIXELS = 160


def frames(dataset: str, shard: str, offset: int, size: int, count: int) -> list[bytes]:
    """`count` JPEGs, evenly spaced in time, of the clip at a byte range of a shard. Raises DataError, StorageError."""
    span = storage.read_range(storage.join(dataset, shard), offset, size)
    frames_FCHW = decode_clip(shards.pictures_in(span), FrameSettings(segments=count, chunks=1, size=PIXELS))
    return [_jpeg(Image.fromarray(frame)) for frame in frames_FCHW.permute(0, 2, 3, 1).numpy()]


def frames_of(dataset: str, split: SplitIndex, videos: Collection[str], count: int) -> dict[str, list[bytes]]:
    """The same by video id, for some videos of a split; reads its markers until all are found."""
    found: dict[str, list[bytes]] = {}
    for entry in split.shards:
        if len(found) == len(set(videos)):
            break
        for sample in shards.read_marker(dataset, entry.name).samples:
            if sample.video_id in videos:
                found[sample.video_id] = frames(dataset, entry.name, *shards.span_of(sample), count)
    return found


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
