"""Annotated videos and a folder of files → clips."""

import logging
import sys
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from common.errors import DataError
from datasets_prep.plan import Clip
from datasets_prep.sources.annotations import clean
from datasets_prep.sources.custom import deal
from datasets_prep.sources.files import VideoFiles

log = logging.getLogger(__name__)


class Span(NamedTuple):
    """A file that may hold a video, and from where to where, in seconds."""

    name: str
    start: float | None = None
    end: float | None = None


class Annotated(NamedTuple):
    """A video as an annotation file tells of it; the first of `spans` whose file is there holds it."""

    split: str
    video_id: str
    source_id: str
    captions: list[str]
    spans: tuple[Span, ...]


def locate(annotated: Iterable[Annotated], videos: str) -> list[Clip]:
    """Clips with their files, captions cleaned.

    Raises:
        DataError: no video, or one that occurs twice (in a split or in two).
        StorageError: the folder can't be listed.
    """
    cleaned = [video._replace(captions=[c for c in map(clean, video.captions) if c]) for video in annotated]
    if not any(video.captions for video in cleaned):
        raise DataError("the annotations hold no video with a caption: give the files as they were published")
    _check_once(cleaned)
    files = VideoFiles(videos)
    found = [_first(files, video.spans) for video in cleaned]
    cuts = Counter(file[0] for _, file in found if file)
    clips = []
    for video, (span, file) in zip(cleaned, found, strict=True):
        path, size = (span.name, None) if file is None else (file[0], file[1] // cuts[file[0]])
        split = sys.intern(video.split)
        captions = tuple(video.captions)
        clips.append(Clip(split, video.video_id, video.source_id, captions, path, span.start, span.end, size))
    counts = Counter(clip.split for clip in clips)
    log.info("videos: %s", ", ".join(f"{split} {count:,}" for split, count in counts.items()))
    return clips


def carve(split: str, source_id: str, share: float) -> str:
    """`split`, but "val" for this share of train's sources: by the hash of `source_id`, and by nothing else."""
    return "val" if split == "train" and deal(source_id, share, 0.0) == "val" else split


def _check_once(annotated: list[Annotated]) -> None:
    splits: dict[str, str] = {}
    for video in annotated:
        other = splits.setdefault(video.video_id, video.split)
        if other != video.split:
            raise DataError(
                f"video {video.video_id!r} is in {other} and in {video.split}: remove it from the annotations of one"
            )
    if len(splits) < len(annotated):
        [(twice, _)] = Counter(video.video_id for video in annotated).most_common(1)
        raise DataError(f"video {twice!r} is annotated twice in {splits[twice]}: remove one of the two")


def _first(files: VideoFiles, spans: tuple[Span, ...]) -> tuple[Span, tuple[str, int] | None]:
    for span in spans:
        file = files.find(span.name)
        if file is not None:
            return span, file
    return spans[0], None
