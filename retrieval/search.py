"""Rank the videos of an index by a sentence. Runs on the CPU, without Ray.

    python -m retrieval.search "a red square moves from left to right" index=FOLDER
    python -m retrieval.search tiny query=cat --json contact_sheet=cat.html

An argument with a space before any "=" is the query, and no preset means `default`. --json is short for format=json:
stdout is then JSON and nothing else. contact_sheet=FILE.html also writes a page with frames that opens offline.
rerank=URL lets a text-conditioned scorer order the best rerank_top videos (see retrieval.embed).

Shapes: T texts, D joint width, K results.
"""

import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common import logs, shards, storage
from common.config import from_command_line, refuse_relative_in_job
from common.errors import ConfigError, DataError, RunError, exit_with
from retrieval import contact_sheet
from retrieval.config import PRESETS, SearchConfig
from retrieval.embeddings import Source
from retrieval.encoder import encode_sentences, load_two_tower
from retrieval.index import Index, open_index
from retrieval.rerank import rerank
from retrieval.result import Hit, Result, table
from training.data import pictures
from training.weights import weights_sha256

log = logging.getLogger(__name__)
PATHS = ("index", "run", "dataset", "contact_sheet", "rerank", "rerank_run", "captions")


def search(config: SearchConfig) -> Result:
    """The best videos for a sentence; writes the contact sheet if one is asked for.

    Raises:
        DataError, RunError, StorageError: as one sentence.
    """
    refuse_relative_in_job(config, *PATHS)
    url = storage.absolute(config.index)
    index = open_index(url)
    source = index.info.source
    moved = {key: storage.absolute(value) for key in ("run", "dataset") if (value := getattr(config, key))}
    source = source.model_copy(update=moved)
    if config.contact_sheet:
        _check_dataset(source)
    hits = _hits(index, _query_vector(index, source, config.query), config.rerank_top if config.rerank else config.k)
    second = None
    if config.rerank:
        hits, second = rerank(config, index.info.source, hits)
    hits = hits[: config.k]
    if config.captions:
        hits = with_captions(config.captions, hits)
    result = Result(
        query=config.query,
        index=url,
        run=source.run,
        dataset=source.dataset,
        split=source.split,
        videos=index.info.videos,
        scored_by="rerank" if second else "index",
        rerank=second,
        captions=config.captions and storage.absolute(config.captions),
        hits=hits,
    )
    if config.contact_sheet:
        frames = [pictures.frames(source.dataset, h.shard, h.offset, h.size, config.frames) for h in hits]
        storage.publish_bytes(contact_sheet.render(result, frames).encode(), config.contact_sheet)
        log.info("contact sheet: %s", storage.absolute(config.contact_sheet))
    return result


def _query_vector(index: Index, source: Source, query: str) -> NDArray[np.float32]:
    """The query's unit vector 1D. Raises RunError if the run's weights are not those the videos were encoded with."""
    run_config, model = load_two_tower(source.run)
    vector_1D = encode_sentences(run_config, model, [query])
    if vector_1D.shape[1] != index.info.dimension:
        raise RunError(
            f"run {source.run} gives vectors of width {vector_1D.shape[1]}, the index holds width "
            f"{index.info.dimension}: give the run that embedded it, or embed and index again"
        )
    if weights_sha256(source.run) != source.weights_sha256:
        raise RunError(
            f"the best weights of run {source.run} are not those that embedded the videos: embed and index again"
        )
    return vector_1D


def _hits(index: Index, vector_1D: NDArray[np.float32], k: int) -> list[Hit]:
    scores_TK, rows_TK = index.nearest(vector_1D, k)
    rows = index.ids.take(rows_TK[0]).to_pylist()
    return [
        Hit(
            rank=rank,
            score=float(score),
            video_id=row["video_id"],
            captions=row["captions"],
            shard=row["shard"],
            offset=row["offset"],
            size=row["size"],
            index_rank=rank,
            index_score=float(score),
        )
        for rank, (score, row) in enumerate(zip(scores_TK[0], rows, strict=True), 1)
    ]


def with_captions(url: str, hits: list[Hit]) -> list[Hit]:
    """The hits with what training.caption wrote of them. Raises DataError if it wrote nothing of one."""
    wanted = {hit.video_id for hit in hits}
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "captions.jsonl"
        storage.download(url, path)
        with path.open(encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                try:
                    line = json.loads(text)
                    if line["video_id"] in wanted:
                        found[line["video_id"]] = str(line["caption"])
                except (ValueError, KeyError, TypeError):
                    raise DataError(f"captions={url}, line {number}: not what training.caption writes") from None
    for hit in hits:
        if hit.video_id not in found:
            raise DataError(
                f"captions={url} says nothing of video {hit.video_id}: write captions for the split of the index"
            )
    return [hit.model_copy(update={"generated": found[hit.video_id]}) for hit in hits]


def _check_dataset(source: Source) -> None:
    _, sha256 = shards.read_dataset(source.dataset)
    if sha256 != source.dataset_sha256:
        raise DataError(
            f"dataset {source.dataset} was built again since its videos were embedded: embed and index it again, "
            "or give dataset=URL of the old one"
        )


def arguments(argv: Sequence[str]) -> list[str]:
    """The command line as `PRESET key=value ...`: see the top of this file for the rule."""
    plain = ["format=json" if a == "--json" else a for a in argv]
    sentences = [a for a in plain if " " in a.partition("=")[0].strip()]
    rest = [a for a in plain if a not in sentences]
    if len(sentences) > 1:
        raise ConfigError(f"two sentences given, {sentences[0]!r} and {sentences[1]!r}: search for one at a time")
    if not rest or "=" in rest[0] or rest[0].startswith("-"):
        rest.insert(0, "default")
    return rest + [f"query={json.dumps(sentence)}" for sentence in sentences]


def main() -> None:
    logs.setup()
    config = from_command_line(SearchConfig, PRESETS / "search", "retrieval.search", arguments(sys.argv[1:]))
    result = search(config)
    print(result.model_dump_json(indent=2) if config.format == "json" else table(result))


if __name__ == "__main__":
    exit_with(main)
