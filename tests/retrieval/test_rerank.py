"""Two stages: features of a text-conditioned run, what is read of them, and the order they give to an index's hits."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from common import storage
from common.errors import ConfigError, DataError, RunError, StorageError
from common.shards import DatasetIndex, SplitIndex
from retrieval.config import IndexConfig, SearchConfig
from retrieval.embed import embed
from retrieval.embeddings import Embeddings, Part, Source, part_name, read_embeddings
from retrieval.features import read_features, write_features
from retrieval.index import build
from retrieval.result import Hit, table
from retrieval.search import search
from tests.retrieval.conftest import SHARD_SIZES, embed_here, settings, write_dataset, write_run
from training import models
from training.data.decode import decode_clip
from training.data.loader import eval_frames
from training.encode import encode_clips
from training.weights import load_run

QUERIES = ["a red square moves from left to right", "nothing", "square 3 moves"]
XPOOL = {"name": "xpool"}


@pytest.fixture(scope="session")
def scorer(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> str:
    """A run with a scorer, of other weights than the index's."""
    return write_run(tmp_path_factory.mktemp("scorers"), "xpool", dataset, seed=5, scorer=XPOOL)


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory, scorer: str) -> str:
    config = settings(scorer, tmp_path_factory.mktemp("features"))
    embed_here(config)
    return config.output


def scores(run: str, dataset: Path, hits: list[Hit], query: str) -> dict[str, float]:
    """Of each hit, from its pictures, by the scorer itself."""
    config, model = load_run(run)
    clips = [storage.read_range(f"{dataset}/{hit.shard}", hit.offset, hit.size) for hit in hits]
    frames = torch.stack([decode_clip([clip], eval_frames(config, config.eval.views)) for clip in clips])
    with torch.no_grad():
        query_T = model.query(model.encode_text(models.tokenize(config.model)([query])))
        scores_V = model.score(query_T, encode_clips(model, frames, config.eval.views))[0]
    return dict(zip((hit.video_id for hit in hits), scores_V.tolist(), strict=True))


@pytest.mark.parametrize("name", models.SCORERS)
def test_with_all_videos_the_order_is_the_scorers_own(name: str, index: str, dataset: Path, tmp_path: Path) -> None:
    """Seen to fail where a video gets another one's row."""
    run = write_run(tmp_path, name, dataset, seed=5, scorer={"name": name}, views=1 if name == "xclip" else 2)
    features = settings(run, tmp_path)
    embed_here(features)
    for query in QUERIES:
        first = search(SearchConfig(index=index, query=query, k=8))
        found = search(SearchConfig(index=index, query=query, k=8, rerank=features.output))
        expected = scores(run, dataset, first.hits, query)
        assert [hit.video_id for hit in found.hits] == sorted(expected, key=lambda video: -expected[video])
        np.testing.assert_allclose(
            [hit.score for hit in found.hits], sorted(expected.values(), reverse=True), atol=1e-5
        )
        assert [hit.video_id for hit in found.hits] != [hit.video_id for hit in first.hits]
        assert (first.scored_by, found.scored_by) == ("index", "rerank")
        assert first.rerank is None and found.rerank is not None
        assert found.rerank.model_dump() == {"features": features.output, "run": run, "scorer": name, "videos": 8}


def test_only_what_the_index_finds_is_ordered_and_read(
    index: str, features: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = search(SearchConfig(index=index, query=QUERIES[0], k=8))
    read: list[tuple[str, int]] = []
    whole, span = storage.read, storage.read_range
    monkeypatch.setattr(storage, "read", lambda url: read.append((url, 0)) or whole(url))
    monkeypatch.setattr(storage, "read_range", lambda *args: read.append((args[0], args[2])) or span(*args))
    found = search(SearchConfig(index=index, query=QUERIES[0], k=2, rerank=features, rerank_top=3))
    rows = [(url, size) for url, size in read if url.endswith(".bin")]
    assert [size for _, size in rows] == [2 * 2 * 64 * 4] * 3, "two views of two frames in float32, of three videos"
    assert len(found.hits) == 2 and found.rerank is not None and found.rerank.videos == 3
    before = {hit.video_id: hit for hit in first.hits[:3]}
    for rank, hit in enumerate(found.hits, 1):
        assert (hit.rank, hit.index_rank) == (rank, before[hit.video_id].rank)
        assert hit.index_score == pytest.approx(before[hit.video_id].score, abs=1e-6)
    lines = table(found).splitlines()
    assert lines[0].split() == ["rank", "score", "index", "video", "caption"]
    assert [int(line.split()[2]) for line in lines[1:]] == [hit.index_rank for hit in found.hits]


def test_float16_changes_scores_by_little(index: str, features: str, scorer: str, tmp_path: Path) -> None:
    half = settings(scorer, tmp_path, dtype="float16")
    embed_here(half)
    assert (Path(half.output) / "part-000000.bin").stat().st_size == SHARD_SIZES[0] * 2 * 2 * 64 * 2
    for query in QUERIES:
        found = [search(SearchConfig(index=index, query=query, k=8, rerank=url)) for url in (features, half.output)]
        single, halved = ({hit.video_id: hit.score for hit in result.hits} for result in found)
        assert single == pytest.approx(halved, abs=1e-3) and single != halved


def test_features_of_any_shape_are_read_by_row(tmp_path: Path) -> None:
    source = Source(
        run="r",
        dataset="d",
        weights_sha256="w",
        dataset_sha256="s",
        split="test",
        views=1,
        kind="features",
        shape=(2, 3, 5),
        dtype="float32",
    )
    given = np.random.default_rng(0).normal(size=(7, 2, 3, 5)).astype(np.float32)
    names = [f"v{n}" for n in range(7)]
    url = str(tmp_path)
    write_features(f"{url}/{part_name(0)}", source, given[:4], names[:4])
    write_features(f"{url}/{part_name(1)}", source, given[4:], names[4:])
    parts = [Part(name=part_name(n), shard=f"s{n}", videos=count) for n, count in enumerate((4, 3))]
    embeddings = Embeddings(source=source, parts=parts)
    wanted = [5, 0, 6, 3]
    found = read_features(url, embeddings, [(f"s{int(n >= 4)}", names[n]) for n in wanted])
    np.testing.assert_array_equal(found, given[wanted])
    (tmp_path / "part-000001.bin").write_bytes(given[4:].tobytes()[:-1])
    with pytest.raises(StorageError, match=r"part-000001.bin ends early"):
        read_features(url, embeddings, [("s1", "v6")])


def test_a_part_is_there_once_its_rows_are(scorer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parquet file is what a resumed run goes by. Seen to fail where that one is published first."""
    publish = storage.publish

    def fails(path: Path, url: str, if_none_match: bool = False) -> None:
        if url.endswith(".bin"):
            raise StorageError("full")
        publish(path, url, if_none_match)

    monkeypatch.setattr(storage, "publish", fails)
    with pytest.raises(StorageError, match="full"):
        embed_here(settings(scorer, tmp_path))
    assert not list(tmp_path.rglob("part-*"))


def test_a_video_without_features_is_told(run: str, scorer: str, dataset: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(dataset, tmp_path / "data"))
    whole = DatasetIndex.model_validate_json((data / "dataset.json").read_text())
    few = {"val": SplitIndex(shards=whole.splits["test"].shards[:1]), **whole.splits}
    (data / "dataset.json").write_text(whole.model_copy(update={"splits": few}).model_dump_json())
    vectors = settings(run, tmp_path, dataset=str(data))
    less = settings(scorer, tmp_path, dataset=str(data), split="val", output=str(tmp_path / "features"))
    embed_here(vectors)
    embed_here(less)
    build(IndexConfig(embeddings=vectors.output, output=str(tmp_path / "index")))
    with pytest.raises(DataError, match=r"holds no features of video video00\d: it was made of the split val"):
        search(SearchConfig(index=str(tmp_path / "index"), query="x", k=8, rerank=less.output))


def test_features_are_no_index_and_vectors_no_features(
    index: str, vectors: str, features: str, scorer: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"there is no vector to index. Give retrieval.search rerank="):
        build(IndexConfig(embeddings=features, output=str(tmp_path)))
    with pytest.raises(RunError, match="scores a video only together with a query"):
        search(SearchConfig(index=index, query="x", run=scorer))
    with pytest.raises(DataError, match=r"holds vectors of run .* which has no model.scorer"):
        search(SearchConfig(index=index, query="x", rerank=vectors))
    with pytest.raises(DataError, match=r"holds no embeddings\.json"):
        search(SearchConfig(index=index, query="x", rerank=str(tmp_path)))
    with pytest.raises(RunError, match=r"holds vectors of run .* with another weights_sha256, kind, shape"):
        embed_here(settings(scorer, tmp_path, output=vectors))


def test_more_frames_than_the_scorer_is_made_for_are_refused(dataset: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path, "xclip", dataset, scorer={"name": "xclip"}, views=1)
    with pytest.raises(ConfigError, match=r"eval.views=3 .* are more frames than the scorer xclip is made for"):
        embed_here(settings(run, tmp_path, views=3))


def test_features_of_other_data_or_weights_are_refused(
    index: str, features: str, scorer: str, dataset: Path, tmp_path: Path
) -> None:
    """Seen to fail without either check."""
    other = settings(scorer, tmp_path, dataset=str(write_dataset(tmp_path / "data", (1,))))
    embed_here(other)
    with pytest.raises(DataError, match="is of another dataset"):
        search(SearchConfig(index=index, query="x", rerank=other.output))
    changed = write_run(tmp_path, "other", dataset, seed=6, scorer=XPOOL)
    with pytest.raises(RunError, match="are not those that made the features"):
        search(SearchConfig(index=index, query="x", rerank=features, rerank_run=changed))
    moved = str(shutil.copytree(scorer, tmp_path / "moved"))
    found = search(SearchConfig(index=index, query="x", rerank=features, rerank_run=moved))
    assert found.rerank is not None and found.rerank.run == moved


def test_more_hits_than_are_reranked_are_refused() -> None:
    with pytest.raises(ValueError, match="k=20 is more than the rerank_top=10 videos that are re-ranked"):
        SearchConfig(index="i", query="q", k=20, rerank="f", rerank_top=10)


def write_captions(path: Path, videos: range) -> str:
    lines = [{"video_id": f"video{n:03d}", "caption": f"it's <b>{n}</b>", "score": -0.5} for n in videos]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_the_contact_sheet_says_what_a_model_said_and_who_scored(index: str, features: str, tmp_path: Path) -> None:
    page, captions = tmp_path / "sheet.html", write_captions(tmp_path / "captions.jsonl", range(8))
    shown = {"index": index, "query": "x", "k": 3, "contact_sheet": str(page), "frames": 1}
    found = search(SearchConfig(**shown, rerank=features, captions=captions))
    text = page.read_text()
    generated = re.findall(r'class="generated"><small>model</small>([^\n]*)</p>', text)
    assert generated == [f"it&#x27;s &lt;b&gt;{int(hit.video_id[-3:])}&lt;/b&gt;" for hit in found.hits]
    assert re.findall(r"index: rank (\d), ", text) == [str(hit.index_rank) for hit in found.hits]
    assert "ordered by xpool" in text and features in text and captions in text
    assert [hit.generated for hit in found.hits] == [f"it's <b>{int(hit.video_id[-3:])}</b>" for hit in found.hits]
    assert found.captions == captions
    search(SearchConfig(**shown))
    assert "generated" not in page.read_text().split("</style>")[1] and "index: rank" not in page.read_text()


def test_captions_of_other_videos_are_refused(index: str, tmp_path: Path) -> None:
    captions = write_captions(tmp_path / "captions.jsonl", range(3))
    with pytest.raises(DataError, match=r"captions=.* says nothing of video video00\d: write captions for the split"):
        search(SearchConfig(index=index, query="x", captions=captions))
    Path(captions).write_text('{"video_id": "video000", "caption": "a"}\n{"video_id": 1}\nnothing\n')
    with pytest.raises(DataError, match=r"captions=.*, line 3: not what training.caption writes"):
        search(SearchConfig(index=index, query="x", captions=captions))


def test_two_stages_on_ray_and_s3(ray_local: object, s3: str, index: str, scorer: str, tmp_path: Path) -> None:
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    config = settings(scorer, tmp_path, output=storage.join(s3, "features"), actors=2)
    embed(config)
    here = settings(scorer, tmp_path)
    embed_here(here)
    assert read_embeddings(config.output) == read_embeddings(here.output)
    found = [
        search(SearchConfig(index=index, query=QUERIES[0], k=8, rerank=url)) for url in (config.output, here.output)
    ]
    assert [hit.video_id for hit in found[0].hits] == [hit.video_id for hit in found[1].hits]
    np.testing.assert_allclose(*([hit.score for hit in result.hits] for result in found), atol=1e-5)
