"""ActivityNet Captions as paragraph retrieval: {id: {"duration", "timestamps", "sentences"}}, sentences joined."""

import logging
from collections.abc import Iterator

from common.errors import DataError
from datasets_prep.benchmarks import ActivityNetConfig
from datasets_prep.plan import Clip
from datasets_prep.sources.annotations import clean, read_ids, read_json, some
from datasets_prep.sources.locate import Annotated, Span, carve, locate

log = logging.getLogger(__name__)


def read(config: ActivityNetConfig) -> list[Clip]:
    """Whole videos with one paragraph each; val is carved from train.

    Raises:
        DataError: a file is of another form, or a video is in two splits.
        StorageError: a file or the folder can't be read.
    """
    bad = frozenset(read_ids(config.bad_videos) if config.bad_videos else ())
    train = [
        video._replace(split=carve("train", video.source_id, config.carve_val))
        for video in _split("train", config.train, config.train_ids, bad)
    ]
    return locate([*train, *_split("test", config.test, config.test_ids, bad)], config.videos)


def _split(split: str, url: str, ids: str | None, bad: frozenset[str]) -> Iterator[Annotated]:
    videos = read_json(url)
    try:
        paragraphs = {str(i): " ".join(map(clean, video["sentences"])) for i, video in videos.items()}
    except (KeyError, TypeError, AttributeError):
        raise DataError(f'{url} is not ActivityNet Captions: expected {{"v_…": {{"sentences": […]}}}}') from None
    left_out = bad & paragraphs.keys()
    if left_out:
        log.warning("%s: %d bad videos are left out (%s)", url, len(left_out), some(sorted(left_out)))
    listed = list(paragraphs)
    if ids is not None:
        wanted = read_ids(ids)
        differing = set(wanted) ^ paragraphs.keys()
        listed = [i for i in wanted if i in paragraphs]
        if differing:
            log.warning(
                "%s and %s differ in %d ids (%s): only those in both are taken",
                *(ids, url, len(differing), some(sorted(differing))),
            )
    for video_id in listed:
        if video_id not in bad:
            # Files are called "v_ID" by ActivityNet and "ID" by YouTube.
            names = (video_id, video_id.removeprefix("v_"))
            yield Annotated(split, video_id, video_id, [paragraphs[video_id]], tuple(map(Span, dict.fromkeys(names))))
