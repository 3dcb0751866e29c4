"""VATEX: [{"videoID", "enCap": [10 sentences], "chCap"}], ids ending in _START_END of the YouTube video, in seconds."""

import logging
import re
from collections.abc import Iterator

from common.errors import DataError
from datasets_prep.benchmarks import VatexConfig
from datasets_prep.plan import Clip
from datasets_prep.sources.annotations import read_ids, read_json, some
from datasets_prep.sources.locate import Annotated, Span, locate

log = logging.getLogger(__name__)
FORM = '[{"videoID": "…_START_END", "enCap": […]}, …]'


def read(config: VatexConfig) -> list[Clip]:
    """The clips of VATEX with their English captions.

    A clip is a file of its own, named by its id, else a span of the whole YouTube video, which is its source.

    Raises:
        DataError: a file is of another form, or a video is in two splits.
        StorageError: a file or the folder can't be read.
    """
    annotated = [
        *_split("train", config.train, config.train_ids),
        *_split("val", config.val, config.val_ids),
        *_split("test", config.test, config.test_ids),
    ]
    return locate(annotated, config.videos)


def _split(split: str, url: str, ids: str | None) -> Iterator[Annotated]:
    videos = read_json(url)
    try:
        captions = [(str(video["videoID"]), list(map(str, video["enCap"]))) for video in videos]
    except KeyError as error:
        way_out = "give the public test set with captions" if error.args == ("enCap",) else f"expected {FORM}"
        raise DataError(f"{url}: a video has no {error}: {way_out}") from None
    except TypeError:
        raise DataError(f"{url} is not VATEX's JSON: expected {FORM}") from None
    if ids is not None:
        wanted = set(read_ids(ids))
        absent = wanted - {video_id for video_id, _ in captions}
        if absent:
            log.warning("%s: %d ids are not in %s (%s): left out", ids, len(absent), url, some(sorted(absent)))
        captions = [(video_id, sentences) for video_id, sentences in captions if video_id in wanted]
    for video_id, sentences in captions:
        cut = re.fullmatch(r"(.+)_(\d{6})_(\d{6})", video_id)
        if cut is None:
            raise DataError(
                f"{url}: the id {video_id!r} does not end in _START_END of six digits each: expected {FORM}"
            )
        whole = Span(cut[1], float(cut[2]), float(cut[3]))
        yield Annotated(split, video_id, cut[1], sentences, (Span(video_id), whole))
