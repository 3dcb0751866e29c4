"""How fast training's input is on one core, beside raw decoding and the research repositories' way of reading.

    python -m benchmarks.input [key=value ...]

Rounds in alternating order over the same clips, one process pinned to one core, clip by clip:

ours video        a ClipDataset item (local shard → decord → training crop → uint8 at 224), payload `video`
ours frames       the same, payload `frames`
decord            the limit of `video`: opens the same mp4 bytes, get_batch of the same frames, nothing else
simplejpeg        the limit of `frames`: decodes the same JPEGs, nothing else
decoded cache     the same JPEGs' frames from a local file of all of them decoded once, uint8, with training's crop
opencv            as the official repositories read: OpenCV on a file, a seek for each frame, float at full size before
                  crop and resize (bilinear, theirs in training) and normalisation; on the same mp4 as `ours video`
opencv, original  the same on the file that the clip was made from: those repositories read what was downloaded

The opencv sides need opencv-python-headless, which the project does not: pip install it by hand. Clips are those of
`data`/web_video, else made with ffmpeg. Rounds are kept in a file, as in benchmarks.prep.
"""

import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import simplejpeg
import torch
from numpy.random import Generator
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor
from torch.nn.functional import interpolate

from benchmarks import rounds
from benchmarks.prep import PrepBenchConfig, inputs
from benchmarks.real_clips import web_video
from benchmarks.rounds import Times
from common import shards
from common.config import Settings
from common.errors import RunError, exit_with
from common.shards import SampleInfo
from training.data import decode
from training.data.cache import ShardCache
from training.data.decode import FrameSettings
from training.data.loader import ClipDataset

REPOSITORY = Path(__file__).parents[1]
CROP = (0.5, 1.0)  # training's
SPANS = {"tasks": "by the clock", "cpu": "by CPU time"}
PAIRS = [
    ("ours video", "decord"),
    ("ours video", "opencv"),
    ("ours video", "opencv, original"),
    ("ours frames", "simplejpeg"),
    ("ours frames", "opencv"),
    ("ours frames", "ours video"),
    ("decoded cache", "ours frames"),
]
Side = Callable[[int], Any]  # reads the clip of a row


class InputBenchConfig(Settings):
    """What is read, and how much of it."""

    folder: str = Field("data/bench-input", description="local folder of datasets, results and temporary files")
    data: str = Field("../shared/data", description="folder that holds web_video/captions.json and its clips")
    rounds: PositiveInt = Field(7, description="paired rounds")
    minutes: PositiveFloat = Field(7.0, description="no round begins that would end later; run again to go on")
    clips: PositiveInt = Field(64, description="clips in a round, at most")
    short_side: PositiveInt = Field(256, description="of the dataset's videos; smaller ones stay as they are")
    gop: PositiveInt = Field(12, description="of the dataset's videos")
    frames: PositiveInt = Field(12, description="frames read from a clip")
    size: PositiveInt = Field(224, description="side of the square that training sees")
    clips_per_gpu: PositiveFloat = Field(
        1250.0, description="clips/s one GPU takes: ViT-B/32 with 12 frames on an H100 at 45 % of its bf16 peak"
    )


def build(config: InputBenchConfig) -> tuple[Path, Path]:
    """The folder with the datasets `video` and `frames` of the same clips, and the folder of their original files."""
    captions = Path(config.data) / "web_video/captions.json"
    if captions.exists():
        name, originals = "web_video", Path(config.data).absolute()
        lines = [web_video(record) for record in json.loads(captions.read_text())]
    else:
        print(f"{captions} is missing: made clips instead")
        made = inputs(PrepBenchConfig(folder=config.folder))
        name, originals = "made", made / "videos"
        lines = [{"video": path.name, "caption": path.name} for path in sorted(originals.iterdir())]
    folder = Path(config.folder).absolute() / f"{name}-{config.clips}-{config.short_side}-{config.gop}"
    folder.mkdir(parents=True, exist_ok=True)
    annotations = folder / "clips.jsonl"
    annotations.write_text("".join(json.dumps({**line, "split": "train"}) + "\n" for line in lines[: config.clips]))
    for payload in ("video", "frames"):
        if (folder / payload / "dataset.json").exists():
            continue
        command = [sys.executable, "-m", "datasets_prep.build", "custom", f"source.annotations={annotations}"]
        command += [f"source.videos={originals}", f"output={folder / payload}", f"payload={payload}", "workers=1"]
        command += [f"video.short_side={config.short_side}", f"video.gop={config.gop}"]
        if subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL).returncode:
            raise RunError(f"the dataset with payload={payload} was not built: see the message above")
    return folder, originals


def open_dataset(config: InputBenchConfig, folder: Path, payload: str) -> ClipDataset:
    """As training opens it, with its crop."""
    dataset, sha256 = shards.read_dataset(str(folder / payload))
    cache = ShardCache(str(folder / payload), sha256, str(folder / "cache"), 1 << 40)
    settings = FrameSettings(config.frames, 1, config.size, CROP, flip=True)
    return ClipDataset(cache, dataset.split("train").shards[:1], settings, seed=0)


def samples_of(data: ClipDataset) -> list[tuple[SampleInfo, list[bytes]]]:
    """What is stored for every clip."""
    tar, index = data.cache.open(data.entries[0])
    return [(shards.read_info(tar, sample), shards.read_pictures(tar, sample)) for sample in index.samples]


def drawn(video_id: str, count: int, config: InputBenchConfig) -> tuple[list[int], Generator]:
    """The frames, each once, that training draws from a clip of `count`, and the generator, which draws the crop."""
    random = decode.draws(0, 0, video_id)
    return sorted(set(decode.frame_indices(count, config.frames, 1, random))), random


def sides_of(
    config: InputBenchConfig, video: ClipDataset, frames: ClipDataset, folder: Path, originals: Path
) -> dict[str, Side]:
    """Every side by its name."""
    import decord

    videos, jpegs = samples_of(video), samples_of(frames)
    ids = [info.video_id for info, _ in videos]
    assert [info.video_id for info, _ in jpegs] == ids
    mp4s = [pictures[0] for _, pictures in videos]
    indices = [drawn(info.video_id, info.num_frames, config)[0] for info, _ in videos]
    chosen = [[all_[i] for i in drawn(info.video_id, len(all_), config)[0]] for info, all_ in jpegs]
    sides: dict[str, Side] = {
        "ours video": lambda row: video[0, 0, row],
        "ours frames": lambda row: frames[0, 0, row],
        "decord": lambda row: decord.VideoReader(io.BytesIO(mp4s[row]), num_threads=1).get_batch(indices[row]),
        "simplejpeg": lambda row: [simplejpeg.decode_jpeg(jpeg) for jpeg in chosen[row]],
    }
    caches = [folder / "decoded" / f"{row}.npy" for row in range(len(jpegs))]
    (folder / "decoded").mkdir(exist_ok=True)
    for path, (_, all_) in zip(caches, jpegs, strict=True):
        np.save(path, np.stack([simplejpeg.decode_jpeg(jpeg) for jpeg in all_]))
    print(f"decoded cache: {sum(path.stat().st_size for path in caches) / len(caches):,.0f} bytes a clip")
    sides["decoded cache"] = lambda row: by_cache(config, caches[row], ids[row])
    if importlib.util.find_spec("cv2") is None:
        print("without the opencv sides: pip install opencv-python-headless to have them")
        return sides
    copies = [folder / "mp4" / f"{row}.mp4" for row in range(len(mp4s))]
    (folder / "mp4").mkdir(exist_ok=True)
    for path, mp4 in zip(copies, mp4s, strict=True):
        path.write_bytes(mp4)
    sides["opencv"] = lambda row: by_opencv(config, copies[row], ids[row])
    sides["opencv, original"] = lambda row: by_opencv(config, originals / ids[row], ids[row])
    return sides


def by_cache(config: InputBenchConfig, path: Path, video_id: str) -> Tensor:
    """What a cache of decoded frames would leave to do: training's draws of a clip, FCHW uint8."""
    stored_FHWC = np.load(path, mmap_mode="r")
    indices, random = drawn(video_id, len(stored_FHWC), config)
    crop_FCHW = decode.random_crop(torch.from_numpy(stored_FHWC[indices]).permute(0, 3, 1, 2), CROP, random)
    frames_FCHW = decode.resize(crop_FCHW, config.size)
    return frames_FCHW.flip(-1) if random.random() < 0.5 else frames_FCHW


def by_opencv(config: InputBenchConfig, path: Path, video_id: str) -> Tensor:
    """The research repositories' reading scheme with training's draws: a clip's frames, FCHW float, normalised."""
    import cv2

    capture = cv2.VideoCapture(str(path))
    indices, random = drawn(video_id, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), config)
    pictures = []
    for index in indices:
        capture.set(cv2.CAP_PROP_POS_FRAMES, index)
        is_read, picture = capture.read()
        if not is_read:
            raise RunError(f"OpenCV cannot read frame {index} of {path}")
        pictures.append(torch.from_numpy(cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)).permute(2, 0, 1))
    capture.release()
    frames_FCHW = torch.stack(pictures).float() / 255
    crop_FCHW = decode.random_crop(frames_FCHW, CROP, random)
    crop_FCHW = interpolate(crop_FCHW, (config.size, config.size), mode="bilinear")
    if random.random() < 0.5:
        crop_FCHW = crop_FCHW.flip(-1)
    mean, std = torch.tensor([0.481, 0.458, 0.408]), torch.tensor([0.269, 0.261, 0.276])
    return (crop_FCHW - mean[:, None, None]) / std[:, None, None]


def timed(side: Side, clips: int) -> Times:
    """Seconds for all clips, by the clock and of this process's CPU time, its decoders' threads included."""
    start, cpu = time.monotonic(), time.process_time()
    for row in range(clips):
        side(row)
    return {"tasks": time.monotonic() - start, "cpu": time.process_time() - cpu}


def summary(rows: list[dict[str, Times]], clips: int, sizes: dict[str, float], config: InputBenchConfig) -> list[str]:
    """Clips/s of every side, ratios of the sides that there are, and what a GPU needs; `sizes` are bytes a clip."""
    lines = []
    for span, name in SPANS.items():
        lines += [f"{s}: {rounds.spread([clips / row[s][span] for row in rows])} clips/s {name}" for s in rows[0]]
    for span, name in SPANS.items():
        for ours, other in PAIRS:
            if {ours, other} <= rows[0].keys():
                ratios = [row[other][span] / row[ours][span] for row in rows]
                lines.append(f"{ours} / {other}: {rounds.spread(ratios)} {name}")
    rate = config.clips_per_gpu
    lines.append(f"cores per GPU needed for {rate:,.0f} clips/s of {config.frames} frames, by CPU time:")
    for payload, size in sizes.items():
        per_core = median(clips / row[f"ours {payload}"]["cpu"] for row in rows)
        lines.append(f"payload {payload}: {rate / per_core:.1f}, and {rate * size / 1e6:,.0f} MB/s of shards")
    return lines


def main() -> int:
    config = rounds.configured(InputBenchConfig)
    folder, originals = build(config)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)  # as the loader's processes
    datasets = {payload: open_dataset(config, folder, payload) for payload in ("video", "frames")}
    infos = [info for info, _ in samples_of(datasets["video"])]
    sizes = {payload: data.entries[0].bytes / len(infos) for payload, data in datasets.items()}
    length = sum(info.num_frames for info in infos) / len(infos)
    print(f"{len(infos)} clips, {length:.0f} frames on average, {infos[0].width}x{infos[0].height} pixels the first")
    print(", ".join(f"payload {payload}: {size:,.0f} bytes a clip" for payload, size in sizes.items()))
    sides = sides_of(config, datasets["video"], datasets["frames"], folder, originals)
    for side in sides.values():
        side(0)  # imports, and the shard's way into the cache
    key = {**config.model_dump(exclude={"folder", "data", "rounds", "minutes", "clips_per_gpu"}), "sides": list(sides)}
    timers = {name: lambda side=side: timed(side, len(infos)) for name, side in sides.items()}
    rows = rounds.run(folder / "rounds.jsonl", key, config.rounds, config.minutes, timers, folder / "out")
    print("\n".join(summary(rows, len(infos), sizes, config)) if rows else "no round yet")
    return 0


if __name__ == "__main__":
    exit_with(main)
