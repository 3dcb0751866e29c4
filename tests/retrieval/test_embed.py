"""Shards → vectors: values, resume, and what is refused."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch

from common import storage
from common.errors import ConfigError, DataError, RunError
from retrieval import encoder
from retrieval.config import EmbedConfig
from retrieval.embed import embed
from retrieval.embeddings import part_name, read_embeddings, read_part
from tests.entry import REPOSITORY
from tests.retrieval.conftest import SHARD_SIZES, embed_here, settings, write_dataset, write_run
from training.data.decode import decode_clip
from training.data.loader import eval_frames
from training.encode import encode_clips
from training.weights import load_run, run_url, save_best


def test_a_row_is_the_vector_of_the_clip_at_its_bytes(run: str, dataset: Path, vectors: str) -> None:
    config, model = load_run(run)
    embeddings = read_embeddings(vectors)
    assert [part.videos for part in embeddings.parts] == list(SHARD_SIZES)
    names = []
    for part in embeddings.parts:
        vectors_VD, table = read_part(vectors, part, embeddings.source)
        for vector_D, row in zip(vectors_VD, table.to_pylist(), strict=True):
            clip = storage.read_range(f"{dataset}/{row['shard']}", row["offset"], row["size"])
            frames_FCHW = decode_clip([clip], eval_frames(config, config.eval.views))
            with torch.no_grad():
                expected_BD = encode_clips(model, frames_FCHW[None], config.eval.views)
            np.testing.assert_allclose(vector_D, expected_BD[0], atol=1e-5)
            names.append(row["video_id"])
            seed = int(row["video_id"][-3:])
            assert row["caption_ids"] == [f"c{seed}-{n}" for n in range(1 + seed % 3)]
            assert row["captions"][0].startswith(f"square {seed} ")
    assert names == [f"video{n:03d}" for n in range(sum(SHARD_SIZES))]


def test_float16_is_float32_rounded(run: str, vectors: str, tmp_path: Path) -> None:
    config = settings(run, tmp_path, dtype="float16")
    half = embed_here(config)
    stored = pq.read_table(f"{config.output}/{part_name(0)}")["vector"]
    assert str(stored.type) == "fixed_size_list<element: halffloat>[64]"
    single = read_embeddings(vectors)
    for part in half.parts:
        halves, _ = read_part(config.output, part, half.source)
        singles, _ = read_part(vectors, part, single.source)
        np.testing.assert_array_equal(halves, singles.astype(np.float16).astype(np.float32))


def test_views_change_the_vectors(run: str, vectors: str, tmp_path: Path) -> None:
    config = settings(run, tmp_path, views=1)
    one = embed_here(config)
    two = read_embeddings(vectors)
    assert (one.source.views, two.source.views) == (1, 2)
    assert not np.allclose(
        read_part(config.output, one.parts[0], one.source)[0], read_part(vectors, two.parts[0], two.source)[0]
    )


def test_only_missing_parts_are_encoded(embed_config: EmbedConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    embed_here(embed_config)
    output = Path(embed_config.output)
    kept = {name: (output / name).stat().st_mtime_ns for name in (part_name(0), part_name(2))}
    first = (output / part_name(1)).read_bytes()
    (output / part_name(1)).unlink()
    (output / "embeddings.json").unlink()
    encoded = []
    real = encoder.Embedder.embed
    monkeypatch.setattr(encoder.Embedder, "embed", lambda self, *item: encoded.append(item[1]) or real(self, *item))
    assert embed_here(embed_config).videos == sum(SHARD_SIZES)
    assert encoded == [1]
    assert (output / part_name(1)).read_bytes() == first
    assert {name: (output / name).stat().st_mtime_ns for name in kept} == kept


def test_an_empty_shard_gives_an_empty_part(tmp_path: Path, run: str) -> None:
    dataset = write_dataset(tmp_path / "data", (0, 1))
    config = settings(run, tmp_path, dataset=str(dataset))
    embeddings = embed_here(config)
    vectors_VD, table = read_part(config.output, embeddings.parts[0], embeddings.source)
    assert vectors_VD.shape == (0, 64)
    assert len(table) == 0
    assert embeddings.videos == 1


@pytest.mark.parametrize("what", ["weights_sha256", "dataset_sha256", "views, dtype"])
def test_parts_of_another_source_are_refused(what: str, run: str, dataset: Path, vectors: str, tmp_path: Path) -> None:
    config = settings(run, tmp_path, output=vectors)
    if what == "weights_sha256":
        config = config.model_copy(update={"run": write_run(tmp_path, "other", dataset, seed=1)})
    elif what == "dataset_sha256":
        config = config.model_copy(update={"dataset": str(write_dataset(tmp_path / "data", (1,)))})
    else:
        config = config.model_copy(update={"views": 3, "dtype": "float16"})
    with pytest.raises(RunError, match=f"with another {what}: choose another output"):
        embed_here(config)


def test_a_run_without_best_weights_is_refused(embed_config: EmbedConfig, dataset: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path, "untrained", dataset)
    Path(run, "best", "model.safetensors").unlink()
    with pytest.raises(RunError, match="untrained has no best weights"):
        embed_here(embed_config.model_copy(update={"run": run}))
    with pytest.raises(RunError, match="is not the folder of a run"):
        embed_here(embed_config.model_copy(update={"run": str(tmp_path / "nothing")}))


def test_weights_that_change_underway_are_refused(dataset: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path, "training", dataset)
    config = settings(run, tmp_path)
    source, entries = _planned(config)
    write_run(tmp_path, "training", dataset, seed=1)
    with pytest.raises(RunError, match="changed while it was being embedded"):
        encoder.Embedder(config, source, "cpu").embed(entries[0], 0)


def test_weights_that_are_not_finite_are_refused(dataset: Path, tmp_path: Path) -> None:
    run = write_run(tmp_path, "nan", dataset)
    config, model = load_run(run)
    model.clip.visual.proj.data.fill_(float("nan"))
    save_best(run_url(config), model, 1, {})
    with pytest.raises(DataError, match=r"test/shard-000000.tar, video video000: its features are not finite"):
        embed_here(settings(run, tmp_path))


def test_an_unknown_split_is_refused(embed_config: EmbedConfig) -> None:
    with pytest.raises(DataError, match="no split 'val'; it has test"):
        embed_here(embed_config.model_copy(update={"split": "val"}))


def test_more_frames_than_there_are_jpegs_are_refused(run: str, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", (1,))
    for path in (root / "dataset.json", root / "test" / "shard-000000.json"):  # one JPEG a clip
        path.write_text(path.read_text().replace('"payload":"video"', '"payload":"frames"').replace("mp4", "000.jpg"))
    with pytest.raises(ConfigError, match=r"eval\.views=3 .* are 6 frames, the dataset has 1 JPEGs a clip: lower"):
        embed_here(settings(run, tmp_path, dataset=str(root), views=3))


def test_a_submitted_job_needs_absolute_paths(
    embed_config: EmbedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "_ray_pkg_1").mkdir()
    monkeypatch.chdir(tmp_path / "_ray_pkg_1")
    with pytest.raises(ConfigError, match="output=vectors is relative"):
        embed_here(embed_config.model_copy(update={"output": "vectors"}))


@pytest.fixture
def ray_driver(ray_local: object) -> None:
    """This process, connected to the shared cluster."""
    ray.init(ignore_reinit_error=True, log_to_driver=False)


@pytest.mark.usefixtures("ray_driver")
class TestOnRay:
    def test_the_pool_writes_what_one_process_writes(self, run: str, vectors: str, tmp_path: Path) -> None:
        config = settings(run, tmp_path)
        embeddings, expected = embed(config), read_embeddings(vectors)
        assert embeddings == read_embeddings(config.output) == expected
        for part in expected.parts:
            mine, theirs = (read_part(url, part, expected.source) for url in (config.output, vectors))
            np.testing.assert_allclose(mine[0], theirs[0], atol=1e-6)
            assert mine[1].equals(theirs[1])

    def test_an_undecodable_clip_stops_it(self, run: str, tmp_path: Path) -> None:
        broken = write_dataset(tmp_path / "data", (1, 1), broken=1)
        config = settings(run, tmp_path, dataset=str(broken))
        with pytest.raises(DataError, match=r"test/shard-000001.tar, video video001: cannot decode"):
            embed(config)
        assert (Path(config.output) / part_name(0)).exists()
        with pytest.raises(DataError, match=r"retrieval.embed has not finished"):
            read_embeddings(config.output)

    @pytest.mark.slow
    def test_an_actor_that_dies_is_replaced(
        self, run: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("retrieval.embed.Embedder", DiesOnce)
        config = settings(run, tmp_path)
        assert embed(config).videos == sum(SHARD_SIZES)
        assert (tmp_path / "vectors" / "died").exists()

    @pytest.mark.slow
    def test_a_killed_driver_is_taken_up_where_it_was(self, run: str, tmp_path: Path) -> None:
        data = write_dataset(tmp_path / "data", (2,) * 12)
        config = settings(run, tmp_path, dataset=str(data))
        given = [f"{key}={value}" for key, value in config.model_dump(exclude_none=True).items() if key != "use_gpu"]
        driver = subprocess.Popen([sys.executable, "-m", "retrieval.embed", "tiny", *given], cwd=REPOSITORY)
        output = Path(config.output)
        while not list(output.glob("part-*.parquet")):
            assert driver.poll() is None
            time.sleep(0.01)
        driver.kill()
        driver.wait()
        assert not (output / "embeddings.json").exists()
        before = {path: path.stat().st_mtime_ns for path in output.glob("part-*.parquet")}
        assert embed(config).videos == 24
        assert len(list(output.glob("part-*.parquet"))) == 12
        assert {path: path.stat().st_mtime_ns for path in before} == before

    @pytest.mark.slow
    def test_actors_that_die_again_and_again_are_given_up(
        self, embed_config: EmbedConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("retrieval.embed.RESTARTS", 0)
        monkeypatch.setattr("retrieval.embed.Embedder", DiesOnce)
        with pytest.raises(RunError, match=r"an encoding actor died 1 times .*: run the same command again"):
            embed(embed_config)

    def test_actors_that_fit_nowhere_are_refused(self, embed_config: EmbedConfig) -> None:
        with pytest.raises(ConfigError, match="no node holds an actor with cpus_per_actor=1000"):
            embed(embed_config.model_copy(update={"cpus_per_actor": 1000, "actors": None}))

    def test_actors_that_never_start_are_given_up(
        self, embed_config: EmbedConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("retrieval.embed.WAIT_S", 0.1)
        with pytest.raises(RunError, match="no actor got its 1000 CPUs in start_timeout_s=1"):
            embed(embed_config.model_copy(update={"cpus_per_actor": 1000, "start_timeout_s": 1}))


class DiesOnce(encoder.Embedder):
    """Kills its process at the second shard, once."""

    def embed(self, entry: object, number: int) -> int:
        mark = Path(self.config.output) / "died"
        if number == 1 and not mark.exists():
            mark.touch()
            os._exit(1)
        return super().embed(entry, number)  # type: ignore[arg-type]


def _planned(config: EmbedConfig) -> tuple:
    from retrieval.embed import _source

    return _source(config)
