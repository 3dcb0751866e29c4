"""Vectors → index → ranked videos, against a naive ranking; the command line; the contact sheet."""

import base64
import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from PIL import Image

from common import config as configs
from common import storage
from common.errors import ConfigError, DataError, RunError, StorageError, exit_with
from retrieval import search as command
from retrieval.config import PRESETS, EmbedConfig, IndexConfig, SearchConfig
from retrieval.embed import embed
from retrieval.embeddings import Source, Videos, part_name, read_embeddings, read_part, write_part
from retrieval.index import build, open_index
from retrieval.search import search
from tests import entry
from tests.retrieval.conftest import embed_here, settings, write_dataset, write_run
from training import models
from training.weights import load_run

QUERIES = ["a red square moves from left to right", "nothing", "square 3 moves"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_the_ranking_is_that_of_all_dot_products(dtype: str, run: str, tmp_path: Path) -> None:
    given, index_url = settings(run, tmp_path, dtype=dtype), str(tmp_path / "index")
    embeddings = embed_here(given)
    build(IndexConfig(embeddings=given.output, output=index_url))
    parts = [read_part(given.output, part, embeddings.source) for part in embeddings.parts]
    videos_VD = torch.from_numpy(np.concatenate([vectors for vectors, _ in parts]))
    ids = [name for _, table in parts for name in table["video_id"].to_pylist()]
    config, model = load_run(run)
    for query in QUERIES:
        for k in (1, 3, 8, 100):
            with torch.no_grad():
                text_TD = model.encode_text(models.tokenize(config.model)([query])).vector_TD
            scores_V = (videos_VD @ text_TD.T)[:, 0]
            order = scores_V.argsort(descending=True)[:k]
            hits = search(SearchConfig(index=index_url, query=query, k=k)).hits
            assert [hit.video_id for hit in hits] == [ids[i] for i in order]
            assert [hit.rank for hit in hits] == list(range(1, min(k, 8) + 1))
            np.testing.assert_allclose([hit.score for hit in hits], scores_V[order], atol=1e-6)


def test_an_index_is_replaced_whole(run: str, index: str, tmp_path: Path) -> None:
    copy = str(shutil.copytree(index, tmp_path / "index"))
    data = write_dataset(tmp_path / "data", (2,), first_seed=20)
    config = settings(run, tmp_path, dataset=str(data))
    embed_here(config)
    build(IndexConfig(embeddings=config.output, output=copy))
    assert open_index(copy).ids["video_id"].to_pylist() == ["video020", "video021"]
    shutil.copy(Path(index, "index.faiss"), copy)
    with pytest.raises(DataError, match=r"index.faiss is not the file that index.json names"):
        open_index(copy)


def test_a_video_in_two_parts_is_refused(vectors: str, tmp_path: Path) -> None:
    copy = str(shutil.copytree(vectors, tmp_path / "vectors"))
    _replace_part(copy, read_embeddings(copy).source, ["video000", "x"])
    with pytest.raises(DataError, match="holds video video000 more than once"):
        build(IndexConfig(embeddings=copy, output=str(tmp_path / "index")))


def test_a_part_of_another_source_or_damaged_is_refused(vectors: str, tmp_path: Path) -> None:
    copy = shutil.copytree(vectors, tmp_path / "vectors")
    shutil.copy(copy / part_name(0), copy / part_name(1))
    config = IndexConfig(embeddings=str(copy), output=str(tmp_path / "index"))
    with pytest.raises(DataError, match=r"part-000001.parquet is not the part that embeddings.json names"):
        build(config)
    _replace_part(str(copy), read_embeddings(str(copy)).source.model_copy(update={"views": 9}), ["a", "b"])
    with pytest.raises(DataError, match=r"part-000001.parquet is not the part that embeddings.json names"):
        build(config)
    (copy / part_name(1)).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"part-000001.parquet is damaged"):
        build(config)
    (copy / part_name(1)).unlink()
    with pytest.raises(StorageError, match=r"part-000001.parquet does not exist"):
        build(config)
    (copy / "embeddings.json").unlink()
    with pytest.raises(DataError, match=r"retrieval.embed has not finished"):
        build(config)


def _replace_part(url: str, source: Source, names: list[str]) -> None:
    """Put a part of other videos in the place of the second one."""
    nothing: list[list[str]] = [[] for _ in names]
    zeros = [0] * len(names)
    videos = Videos(video_ids=names, caption_ids=nothing, captions=nothing, keys=names, offsets=zeros, sizes=zeros)
    write_part(f"{url}/{part_name(1)}", source, "test", np.zeros((len(names), 64), np.float32), videos)


def test_other_weights_than_the_embedding_ones_are_refused(index: str, dataset: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path, "other", dataset, seed=1)
    with pytest.raises(RunError, match="are not those that embedded the videos"):
        search(SearchConfig(index=index, query="x", run=other))


def test_a_query_of_another_width_is_refused(index: str, dataset: Path, tmp_path: Path) -> None:
    backbone = json.loads((Path(models.__file__).parent / "backbones" / "tiny.json").read_text())
    (tmp_path / "narrow.json").write_text(json.dumps({**backbone, "embed_dim": 32}))
    narrow = write_run(tmp_path, "narrow", dataset, backbone=str(tmp_path / "narrow.json"))
    with pytest.raises(RunError, match="gives vectors of width 32, the index holds width 64"):
        search(SearchConfig(index=index, query="x", run=narrow))


def test_the_contact_sheet_shows_the_hits_in_order(index: str, tmp_path: Path) -> None:
    page = tmp_path / "sheet.html"
    result = search(SearchConfig(index=index, query="<b>a & b</b>", k=4, frames=3, contact_sheet=str(page)))
    text = page.read_text()
    assert "<b>" not in text
    assert "&lt;b&gt;a &amp; b&lt;/b&gt;" in text
    assert not re.search(r"(src|href)=\"(?!data:)", text), "the page must open offline"
    assert re.findall(r'class="id">(\w+)<', text) == [hit.video_id for hit in result.hits]
    assert re.findall(r'class="score">(-?[\d.]+)<', text) == [f"{hit.score:.3f}" for hit in result.hits]
    images = [Image.open(io.BytesIO(base64.b64decode(data))) for data in re.findall(r"base64,([^\"]+)", text)]
    assert len(images) == 4 * 3
    for first in range(0, len(images), 3):
        columns = [_square_column(image) for image in images[first : first + 3]]
        assert columns == sorted(columns), "the square moves to the right"
        assert columns[0] + 40 < columns[2]


def _square_column(image: Image.Image) -> float:
    """Mean column of the bright square, in pixels of the frame."""
    bright = np.asarray(image.convert("RGB")).max(axis=-1) > 110
    return float(np.nonzero(bright)[1].mean())


def test_a_contact_sheet_of_a_rebuilt_dataset_is_refused(index: str, tmp_path: Path) -> None:
    rebuilt = write_dataset(tmp_path / "data", (1,))
    config = SearchConfig(index=index, query="x", dataset=str(rebuilt))
    assert search(config).hits  # the ranking needs no videos
    with pytest.raises(DataError, match="was built again since its videos were embedded"):
        search(config.model_copy(update={"contact_sheet": str(tmp_path / "sheet.html")}))
    assert not (tmp_path / "sheet.html").exists()


@pytest.mark.parametrize(
    ("given", "understood"),
    [
        (["a red square"], ["default", 'query="a red square"']),
        (["tiny", "a red square", "k=2"], ["tiny", "k=2", 'query="a red square"']),
        (["k=2", "is a = b?"], ["default", "k=2", 'query="is a = b?"']),
        (["query=cat", "--json"], ["default", "query=cat", "format=json"]),
        (["tiny", "query=a red square"], ["tiny", "query=a red square"]),
        ([], ["default"]),
    ],
)
def test_a_sentence_is_the_query(given: list[str], understood: list[str]) -> None:
    assert command.arguments(given) == understood


def test_two_sentences_are_refused() -> None:
    with pytest.raises(ConfigError, match="two sentences given"):
        command.arguments(["a cat", "a dog"])


def test_the_table_on_the_terminal(
    index: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["search", "a red square", f"index={index}", "k=2"])
    with pytest.raises(SystemExit) as exit_:
        exit_with(command.main)
    assert exit_.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["rank", "score", "video", "caption"]
    assert [line.split()[0] for line in lines[1:]] == ["1", "2"]


def test_a_missing_index_is_one_line_and_exit_code_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["search", "tiny", "query=cat", f"index={tmp_path}"])
    with pytest.raises(SystemExit) as exit_:
        exit_with(command.main)
    assert exit_.value.code == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert (
        err == f"error: {tmp_path} holds no index.json: no index, or retrieval.index has not finished (run it again)\n"
    )


def test_the_program_prints_json_alone(index: str) -> None:
    done = entry.run("retrieval.search", "a red square", f"index={index}", "--json")
    assert done.code == 0, done.err
    assert len(json.loads(done.out)["hits"]) == 8


@pytest.mark.parametrize("name", ["embed", "index", "search"])
def test_the_presets_load(name: str) -> None:
    schema, given = {
        "embed": (EmbedConfig, ["run=r"]),
        "index": (IndexConfig, []),
        "search": (SearchConfig, ["query=q"]),
    }[name]
    assert configs.preset_names(PRESETS / name) == ["default", "tiny"]
    for preset in ("default", "tiny"):
        configs.load(schema, preset, given, PRESETS / name)


def test_everything_on_s3(s3: Callable[[], str], ray_local: object, run: str, dataset: Path, tmp_path: Path) -> None:
    root = s3
    data = storage.join(root, "data")
    for file in storage.list_files(str(dataset)):
        storage.publish(Path(file.url), storage.join(data, file.url.removeprefix(str(dataset))))
    for name in ("config.yaml", "best/model.safetensors"):
        storage.publish(Path(run, name), storage.join(root, "run", name))
    config = settings(storage.join(root, "run"), tmp_path, dataset=data, output=storage.join(root, "vectors"))
    ray.init(ignore_reinit_error=True, log_to_driver=False)
    embed(config)
    build(IndexConfig(embeddings=config.output, output=storage.join(root, "index")))
    page = storage.join(root, "sheet.html")
    result = search(SearchConfig(index=storage.join(root, "index"), query="x", k=2, contact_sheet=page))
    assert storage.read(page).count(b"data:image/jpeg") == 2 * 6
    assert len(result.hits) == 2
