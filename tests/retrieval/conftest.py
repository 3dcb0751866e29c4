"""A tiny prepared dataset and a random-weight run, made without datasets_prep and training."""

import subprocess
import tarfile
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
import torch
import webdataset

from common import config, shards, storage
from common.shards import Caption, DatasetIndex, SampleIndex, SampleInfo, ShardEntry, ShardIndex, SplitIndex
from retrieval.config import EmbedConfig, IndexConfig
from retrieval.embed import embed
from retrieval.embeddings import Embeddings
from retrieval.encoder import Embedder
from retrieval.index import build
from training import models, weights
from training.config import TrainConfig

SHARD_SIZES = (3, 2, 3)
SIDE, NUM_FRAMES = 64, 12


def write_video(path: Path, seed: int) -> None:
    """A bright square on noise that moves to the right; colour and height depend on the seed."""
    random = np.random.default_rng(seed)
    frames = np.repeat(random.integers(0, 90, (1, 8, 8, 3), np.uint8), NUM_FRAMES, 0).repeat(8, 1).repeat(8, 2)
    colour, top = random.integers(120, 255, 3), int(random.integers(0, SIDE - 20))
    for number, frame in enumerate(frames):
        frame[top : top + 20, 4 * number : 4 * number + 20] = colour
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{SIDE}x{SIDE}", "-r", "12", "-i", "-", "-c:v", "libx264", "-pix_fmt", "yuv420p", str(path)]
    subprocess.run(command, input=frames.tobytes(), check=True)


def write_dataset(
    root: Path, sizes: tuple[int, ...] = SHARD_SIZES, first_seed: int = 0, broken: int | None = None
) -> Path:
    """A dataset with the one split "test"; the video of seed `broken` holds no mp4, though its shard is intact."""
    entries, video = [], first_seed
    for number, size in enumerate(sizes):
        name = shards.shard_name("test", number)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        infos = [_info(seed) for seed in range(video, video + size)]
        with webdataset.TarWriter(str(root / name), mtime=0) as tar:
            for seed, info in enumerate(infos, video):
                write_video(root / "video.mp4", seed)
                mp4 = b"no mp4" if seed == broken else (root / "video.mp4").read_bytes()
                tar.write({"__key__": info.video_id, "mp4": mp4, "json": info.model_dump_json().encode()})
        video += size
        entries.append(_marker(root, name, infos))
    index = DatasetIndex(payload="video", plan_hash="x", splits={"test": SplitIndex(shards=entries)}, rejected=0)
    (root / "dataset.json").write_text(index.model_dump_json())
    return root


def _info(seed: int) -> SampleInfo:
    captions = [Caption(id=f"c{seed}-{n}", text=f"square {seed} moves, <said> {n} times") for n in range(1 + seed % 3)]
    name = f"video{seed:03d}"
    return SampleInfo(
        video_id=name, source_id=name, captions=captions, duration_s=1, fps=12, num_frames=12, width=SIDE, height=SIDE
    )


def _marker(root: Path, name: str, infos: list[SampleInfo]) -> ShardEntry:
    with tarfile.open(root / name) as tar:
        members = {m.name: (m.offset_data, m.size) for m in tar}
    samples = [
        SampleIndex(
            key=i.video_id,
            video_id=i.video_id,
            source_id=i.source_id,
            num_captions=len(i.captions),
            members={suffix: members[f"{i.video_id}.{suffix}"] for suffix in ("mp4", "json")},
        )
        for i in infos
    ]
    size, sha256 = (root / name).stat().st_size, shards.sha256_of(root / name)
    index = ShardIndex(plan_hash="x", sha256=sha256, bytes=size, samples=samples)
    (root / shards.marker_name(name)).write_text(index.model_dump_json())
    captions = sum(len(i.captions) for i in infos)
    return ShardEntry(name=name, samples=len(infos), captions=captions, bytes=size, sha256=sha256)


def write_run(
    root: Path,
    name: str,
    dataset: Path | str,
    seed: int = 0,
    backbone: str = "tiny",
    scorer: dict | None = None,
    views: int = 2,
) -> str:
    """A run of random weights, as a training run leaves it."""
    settings = config.validate(
        TrainConfig,
        {
            "run": {"name": name, "storage": str(root)},
            "data": {"dataset": str(dataset)},
            "model": {
                "name": "prompt_switch",
                "backbone": backbone,
                "num_frames": 2,
                "num_prompts": 2,
                "scorer": scorer,
            },
            "optim": {"steps": 1},
            "eval": {"views": views},
        },
    )
    torch.manual_seed(seed)
    url = weights.run_url(settings)
    storage.publish_bytes(config.dump(settings).encode(), storage.join(url, "config.yaml"))
    model = models.build(settings.model)
    for parameter in model.parameters():  # what starts at zero (aggregation) would hide wrong views
        parameter.data.add_(torch.randn_like(parameter), alpha=0.02)
    weights.save_best(url, model, 1, {"r1": 0.5})
    return url


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> str:
    return write_run(tmp_path_factory.mktemp("runs"), "random", dataset)


@pytest.fixture
def embed_config(run: str, tmp_path: Path) -> EmbedConfig:
    return settings(run, tmp_path)


def settings(run: str, folder: Path, **changes: object) -> EmbedConfig:
    values = {"output": str(folder / "vectors"), "dtype": "float32", "batch_size": 2, "actors": 1, **changes}
    return EmbedConfig(run=run, cpus_per_actor=1, use_gpu=False, cache=str(folder / "cache"), **values)


def embed_here(config: EmbedConfig) -> Embeddings:
    """`embed` without Ray: the same shards through one Embedder in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "retrieval.embed._encode",
            lambda config, source, missing: (Embedder(config, source, "cpu").embed(*item) for item in missing),
        )
        return embed(config)


@pytest.fixture(scope="session")
def vectors(run: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A finished embeddings folder in float32."""
    config = settings(run, tmp_path_factory.mktemp("embeddings"))
    embed_here(config)
    return config.output


@pytest.fixture(scope="session")
def index(vectors: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("index"))
    build(IndexConfig(embeddings=vectors, output=url))
    return url
