"""MSR-VTT: 9k/1k-A, 7k/1k-A and the official full split.

All captions are in one JSON, {"videos": [{"video_id", "split", "url", …}], "sentences": [{"video_id", "caption", …}]}.
9k and 7k are a list of training ids and 1,000 test pairs; the official split is said by each video's `split`.
"""

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

from common.errors import DataError
from datasets_prep.benchmarks import MsrvttConfig
from datasets_prep.plan import Clip
from datasets_prep.sources.annotations import read_ids, read_json, some
from datasets_prep.sources.locate import Annotated, Span, carve, locate
from datasets_prep.sources.rows import read_rows

log = logging.getLogger(__name__)
SPLITS = {"train": "train", "validate": "val", "test": "test"}  # as MSR-VTT calls them → as we do
# Videos to train on (with val) and to test on, as the field counts them.
EXPECTED = {"9k": (9000, 1000), "7k": (7010, 1000), "full": (7010, 2990)}


class Captions(NamedTuple):
    """What the JSON files hold, by video id; a video may be in one of the parts only."""

    sentences: dict[str, list[str]]
    videos: dict[str, dict[str, Any]]


def read(config: MsrvttConfig) -> list[Clip]:
    """The clips of one of MSR-VTT's splits.

    A clip's source is the video on the web that it was cut from, where the JSON tells it.

    Raises:
        DataError: a file is of another form, or they contradict each other.
        StorageError: a file or the folder can't be read.
    """
    captions = _captions(config)
    annotated = list(_full(config, captions) if config.protocol == "full" else _1k_a(config, captions))
    tests = sum(video.split == "test" for video in annotated)
    if (len(annotated) - tests, tests) != EXPECTED[config.protocol]:
        log.warning(
            "MSR-VTT %s has %d videos to train on and %d to test on; these files have %d and %d",
            *(config.protocol, *EXPECTED[config.protocol], len(annotated) - tests, tests),
        )
    return locate(annotated, config.videos)


def _1k_a(config: MsrvttConfig, captions: Captions) -> Iterator[Annotated]:
    assert config.train_ids is not None and config.test_pairs is not None, "checked by the config"
    train = read_ids(config.train_ids)
    absent = [i for i in train if i not in captions.sentences]
    if absent:
        raise DataError(
            f"{len(absent):,} videos of {config.train_ids} have no caption in {config.captions} ({some(absent)}): give "
            "MSRVTT_data.json, or source.test_captions too"
        )
    for video_id in train:
        yield _video(config, captions, "train", video_id, captions.sentences[video_id])
    pairs: dict[str, list[str]] = {}
    for _, pair in read_rows(config.test_pairs, ["video_id", "sentence"]):
        pairs.setdefault(pair["video_id"].strip(), []).append(pair["sentence"])
    for video_id, sentences in pairs.items():
        yield _video(config, captions, "test", video_id, sentences)


def _full(config: MsrvttConfig, captions: Captions) -> Iterator[Annotated]:
    if not captions.videos:
        raise DataError(f"{config.captions} has no 'videos' that tell the official split: give MSRVTT_data.json")
    for video_id, video in captions.videos.items():
        if video.get("split") not in SPLITS:
            raise DataError(
                f"{config.captions}: the split of {video_id} is {video.get('split')!r}, not one of {', '.join(SPLITS)}"
            )
        yield _video(config, captions, SPLITS[video["split"]], video_id, captions.sentences.get(video_id, []))


def _video(config: MsrvttConfig, captions: Captions, split: str, video_id: str, sentences: list[str]) -> Annotated:
    url = captions.videos.get(video_id, {}).get("url")
    source_id = url.strip() if isinstance(url, str) and url.strip() else video_id
    if config.protocol != "full":
        split = carve(split, source_id, config.carve_val)
    return Annotated(split, video_id, source_id, sentences, (Span(video_id),))


def _captions(config: MsrvttConfig) -> Captions:
    merged = Captions({}, {})
    for url in [config.captions, *([config.test_captions] if config.test_captions else [])]:
        try:
            content = read_json(url)
            for sentence in content["sentences"]:
                merged.sentences.setdefault(sentence["video_id"], []).append(str(sentence["caption"]))
            merged.videos.update({video["video_id"]: video for video in content.get("videos", [])})
        except (KeyError, TypeError, AttributeError):
            raise DataError(
                f"{url} is not MSR-VTT's JSON: expected "
                '{"videos": [{"video_id", "split", …}], "sentences": [{"video_id", "caption", …}]}'
            ) from None
    return merged
