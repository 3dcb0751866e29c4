"""DiDeMo as paragraph retrieval: the descriptions of a video's moments are one caption.

Two forms: the official JSON, [{"video", "description", "times", …}] with one entry per description, and a table with
one row per video, its paragraph ready in the column `text` and the path on someone's machine in `video_path`.
"""

import posixpath
from collections.abc import Iterator

from common.errors import DataError
from datasets_prep.benchmarks import DidemoConfig
from datasets_prep.plan import Clip
from datasets_prep.sources.annotations import clean, read_json
from datasets_prep.sources.locate import Annotated, Span, locate
from datasets_prep.sources.rows import read_rows


def read(config: DidemoConfig) -> list[Clip]:
    """The clips of DiDeMo's three splits, each from the start of its video to `config.seconds`.

    Raises:
        DataError: a file is of neither form, or a video is in two splits.
        StorageError: a file or the folder can't be read.
    """
    annotated = []
    for split, url in (("train", config.train), ("val", config.val), ("test", config.test)):
        by_name: dict[str, list[str]] = {}
        for path, description in _json(url) if url.endswith(".json") else _table(url):
            by_name.setdefault(posixpath.basename(path.strip()), []).append(clean(description))
        for name, descriptions in by_name.items():
            # Flickr's names hold one dot, before an extension that may be empty, "null" or that of another copy.
            video_id = name.rpartition(".")[0] or name
            spans = tuple(Span(n, None, config.seconds) for n in dict.fromkeys((name, video_id)))
            # In the order of the file, with a blank between them: as the field's loaders do.
            annotated.append(Annotated(split, video_id, video_id, [" ".join(descriptions)], spans))
    return locate(annotated, config.videos)


def _json(url: str) -> Iterator[tuple[str, str]]:
    moments = read_json(url)
    try:
        yield from [(str(moment["video"]), str(moment["description"])) for moment in moments]
    except (KeyError, TypeError):
        raise DataError(f'{url} is not DiDeMo\'s JSON: expected [{{"video": …, "description": …}}, …]') from None


def _table(url: str) -> Iterator[tuple[str, str]]:
    for _, row in read_rows(url, ["video_path", "text"]):
        yield row["video_path"].replace("\\", "/"), row["text"]
