"""MSVD: captions by video id in captions_msvd.json or raw-captions.pkl, and a list of ids for each split."""

import io
import pickle
import re
from typing import Any

from common import storage
from common.errors import DataError
from datasets_prep.benchmarks import MsvdConfig
from datasets_prep.plan import Clip
from datasets_prep.sources.annotations import read_ids, read_json
from datasets_prep.sources.locate import Annotated, Span, locate

FORM = '{"VIDEO_START_END": ["a sentence", …], …}'


def read(config: MsvdConfig) -> list[Clip]:
    """The clips of MSVD's three splits, with every caption, repeated ones too: the field counts them.

    A clip's source is the YouTube video that it was cut from.

    Raises:
        DataError: a file is of another form, or no video listed has a caption.
        StorageError: a file or the folder can't be read.
    """
    captions = _read_pickle(config.captions) if config.captions.endswith(".pkl") else read_json(config.captions)
    sentences = _sentences(config.captions, captions)
    annotated = []
    for split, url in (("train", config.train_ids), ("val", config.val_ids), ("test", config.test_ids)):
        for video_id in read_ids(url):
            source_id = re.sub(r"_\d+_\d+$", "", video_id)
            annotated.append(Annotated(split, video_id, source_id, sentences.get(video_id, []), (Span(video_id),)))
    return locate(annotated, config.videos)


class _Plain(pickle.Unpickler):
    """Unpickles lists, dicts, texts and numbers. Whatever else a pickle may hold could run code: it is refused."""

    def find_class(self, module: str, name: str) -> Any:
        raise DataError(f"it names {module}.{name}, and a file of captions needs no code")


def _read_pickle(url: str) -> Any:
    data = storage.read(url)
    reason = ""
    # Python 2 wrote bytes where Python 3 has text.
    for encoding in ("utf-8", "cp1252"):
        try:
            return _Plain(io.BytesIO(data), encoding=encoding).load()
        except UnicodeDecodeError as error:
            reason = str(error)
        except Exception as error:  # a broken pickle raises whatever its opcodes run into
            reason = str(error)
            break
    raise DataError(f"{url} was not unpickled ({reason}): save it as JSON, {FORM}, and name that file") from None


def _sentences(url: str, captions: Any) -> dict[str, list[str]]:
    """Sentences by video id; a sentence may be a list of words."""
    by_id: dict[str, list[str]] = {}
    if isinstance(captions, dict):
        for video_id, sentences in captions.items():
            if not isinstance(video_id, str) or not isinstance(sentences, list):
                break
            joined = [" ".join(map(str, s)) if isinstance(s, list) else s for s in sentences]
            if not all(isinstance(s, str) for s in joined):
                break
            by_id[video_id] = joined
        else:
            return by_id
    raise DataError(f"{url} is not MSVD's captions: expected {FORM}")
