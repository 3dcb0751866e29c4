"""Moving shapes: a captioned set written by code, in which only the order of frames tells two clips apart.

Every clip has a twin that is its exact frame reversal with a caption of its own ("a red square moves from left to
right" / "from right to left"), so a model that averages frames encoded one by one can't choose between the two. Two
things make that exact: NUM_FRAMES is 6 times an odd number, so the middle frames of 6 segments (2, 7, ..., 27) are the
same set for both; and the files are lossless with every frame a key frame, so a frame has the same bytes in both.

Shapes: N clips, F frames, H height, W width.
"""

import itertools
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import imageio_ffmpeg
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from common import storage
from common.errors import ConfigError, DataError, StorageError
from datasets_prep.config import CustomConfig, MovingShapesConfig
from datasets_prep.plan import Clip
from datasets_prep.sources import custom

Array = NDArray[np.floating]

VERSION = 1  # of what is drawn: a folder written by another version is not taken for this one
NUM_FRAMES, FPS = 30, 10
MARKER = "moving_shapes.json"

COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 190, 70),
    "blue": (60, 110, 255),
    "yellow": (250, 225, 50),
}

# Signed distance to the outline, in units of the shape's radius (negative inside); x and y are in the same units.
SHAPES: dict[str, Callable[[Array, Array], Array]] = {
    "circle": lambda x, y: np.hypot(x, y) - 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) - 0.85,
    "triangle": lambda x, y: np.maximum(y - 0.7, 0.87 * abs(x) - 0.5 * y - 0.5),
    "cross": lambda x, y: np.maximum(np.maximum(abs(x), abs(y)) - 1, np.minimum(abs(x), abs(y)) - 0.3),
}

_AXES = [("left", "right"), ("right", "left")], [("top", "bottom"), ("bottom", "top")]
# A motion is a list of legs (from, to); its reversal has the legs' ends and their order exchanged. One of each pair.
MOTIONS: list[list[tuple[str, str]]] = [
    [("left", "right")],
    [("top", "bottom")],
    [("small", "large")],
    *[[across, down] for across, down in itertools.product(*_AXES)],
]
Meaning = tuple[str, str, int]  # shape, colour, number of the motion: what the two captions of a pair say
MEANINGS: list[Meaning] = list(itertools.product(SHAPES, COLOURS, range(len(MOTIONS))))


class Pair(NamedTuple):
    """A clip and its twin, before they are drawn."""

    split: str
    number: int
    meaning: Meaning
    captions: tuple[str, str]


def read(config: MovingShapesConfig) -> list[Clip]:
    """The clips; writes them first if the folder does not hold them yet.

    Raises:
        ConfigError: the folder holds another set.
        StorageError: the folder is on S3, or can't be written.
    """
    if storage.is_s3(config.videos):
        raise StorageError(f"source.videos={config.videos} is written file by file: give a local or shared folder")
    folder = Path(storage.absolute(config.videos))
    made_from = {"version": VERSION, **config.model_dump(exclude={"name", "videos"})}
    marker = folder / MARKER
    if not marker.exists():
        try:
            _write(config, folder)
            storage.publish_bytes(json.dumps(made_from).encode(), str(marker))
        except OSError as error:
            raise StorageError(f"cannot write source.videos={config.videos}: {error.strerror}") from None
    elif json.loads(marker.read_text()) != made_from:
        raise ConfigError(
            f"source.videos={config.videos} holds moving shapes of another size, number or seed: "
            "choose another folder, or remove that one"
        )
    annotations = str(folder / "annotations.jsonl")
    return custom.read(CustomConfig(annotations=annotations, videos=str(folder)))


def draw_pairs(config: MovingShapesConfig) -> list[Pair]:
    """What every pair says. In val and test no two videos carry the same caption; train has all about equally often."""
    pairs = []
    for number, (split, count) in enumerate(
        [("train", config.num_pairs), ("val", config.val_pairs), ("test", config.test_pairs)]
    ):
        random = np.random.default_rng([config.seed, number])
        rounds = -(-count // len(MEANINGS))
        order = [j for _ in range(rounds) for j in random.permutation(len(MEANINGS)).tolist()][:count]
        for i, meaning in enumerate(MEANINGS[j] for j in order):
            pairs.append(Pair(split, i, meaning, captions_of(meaning)))
    return pairs


def captions_of(meaning: Meaning) -> tuple[str, str]:
    """The sentence of a clip and that of its reversal."""
    shape, colour, motion = meaning
    legs = MOTIONS[motion]
    backwards = [(end, start) for start, end in reversed(legs)]
    return f"a {colour} {shape} {_verb(legs)}", f"a {colour} {shape} {_verb(backwards)}"


def _verb(legs: list[tuple[str, str]]) -> str:
    if legs[0] in (("small", "large"), ("large", "small")):
        return "grows" if legs[0][1] == "large" else "shrinks"
    return "moves " + " and then ".join(f"from {start} to {end}" for start, end in legs)


def render(meaning: Meaning, size: int, random: Generator) -> NDArray[np.uint8]:
    """One clip as RGB frames, uint8 FHWC; its size, path and background are drawn from `random`."""
    shape, colour, motion = meaning
    x_F, y_F, radius_F = _path(MOTIONS[motion], random)
    grid = (np.arange(size, dtype=np.float32) + 0.5) / size
    x_FHW = (grid[None, None, :] - x_F[:, None, None]) / radius_F[:, None, None]
    y_FHW = (grid[None, :, None] - y_F[:, None, None]) / radius_F[:, None, None]
    x_FHW, y_FHW = np.broadcast_arrays(x_FHW, y_FHW)
    distance_FHW = SHAPES[shape](x_FHW, y_FHW) * radius_F[:, None, None] * size  # in pixels
    alpha_FHW = np.clip(0.5 - distance_FHW, 0, 1)[..., None]
    ink = np.clip(np.array(COLOURS[colour]) + random.uniform(-12, 12, 3), 0, 255).astype(np.float32)
    frames_FHWC = alpha_FHW * ink + (1 - alpha_FHW) * _background(size, random)
    return np.rint(frames_FHWC).astype(np.uint8)


def _path(legs: list[tuple[str, str]], random: Generator) -> tuple[Array, Array, Array]:
    """Centre and radius per frame, as parts of the side: each leg takes an equal share of the clip."""
    radius = random.uniform(0.11, 0.17)
    low, high = random.uniform(0.16, 0.26, 2), random.uniform(0.74, 0.84, 2)
    at = {"left": low[0], "right": high[0], "top": low[1], "bottom": high[1], "small": 0.06, "large": 0.28}
    places = {"x": random.uniform(0.3, 0.7), "y": random.uniform(0.3, 0.7), "radius": radius}
    places.update({_axis(leg): at[leg[0]] for leg in legs})  # a motion has one leg per axis
    stops = [dict(places)]  # where the shape is before and after each leg
    for leg in legs:
        places[_axis(leg)] = at[leg[1]]
        stops.append(dict(places))
    times = np.linspace(0, len(legs), NUM_FRAMES)
    x, y, r = (
        np.interp(times, range(len(stops)), [stop[name] for stop in stops]).astype(np.float32)
        for name in ("x", "y", "radius")
    )
    return x, y, r


def _axis(leg: tuple[str, str]) -> str:
    return {"left": "x", "right": "x", "top": "y", "bottom": "y"}.get(leg[0], "radius")


def _background(size: int, random: Generator) -> Array:
    """A dark gradient between two muted colours at any angle, HWC."""
    angle = random.uniform(0, 2 * np.pi)
    grid = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    share_HW = np.clip(0.5 + np.cos(angle) * grid[None, :] + np.sin(angle) * grid[:, None], 0, 1)[..., None]
    first, second = (random.uniform(10, 60) + random.uniform(0, 40, 3) for _ in range(2))
    background: Array = (share_HW * first + (1 - share_HW) * second).astype(np.float32)
    return background


def _write(config: MovingShapesConfig, folder: Path) -> None:
    """All mp4 files and annotations.jsonl. They come under their names only when ffmpeg has finished."""
    folder.mkdir(parents=True, exist_ok=True)
    pairs = draw_pairs(config)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tmp-") as temporary:
        _encode(_clips(pairs, config), config.size, Path(temporary))
        lines = []
        for i, (pair, side) in enumerate(itertools.product(pairs, (0, 1))):
            group = f"{pair.split}-{pair.number:05d}"
            name = f"{group}-{'ab'[side]}.mp4"
            os.replace(Path(temporary) / f"{i}.mp4", folder / name)
            line = {"video": name, "caption": pair.captions[side], "split": pair.split, "group": group}
            lines.append(json.dumps(line) + "\n")
    storage.publish_bytes("".join(lines).encode(), str(folder / "annotations.jsonl"))


def _clips(pairs: list[Pair], config: MovingShapesConfig) -> Iterator[NDArray[np.uint8]]:
    for i, pair in enumerate(pairs):
        frames_FHWC = render(pair.meaning, config.size, np.random.default_rng([config.seed, 1, i]))
        yield frames_FHWC
        yield frames_FHWC[::-1]


def _encode(clips: Iterator[NDArray[np.uint8]], size: int, folder: Path) -> None:
    """Clips → 0.mp4, 1.mp4, ...: one ffmpeg for all, cut by its segment muxer, as a process per clip costs more."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{size}x{size}", "-r", str(FPS), "-i", "-", "-threads", "2", "-pix_fmt", "yuv420p"]
    command += ["-c:v", "libx264", "-qp", "0", "-g", "1", "-preset", "ultrafast"]  # lossless, every frame a key frame
    command += ["-sws_flags", "accurate_rnd+bitexact", "-fflags", "+bitexact", "-flags:v", "+bitexact"]
    command += ["-f", "segment", "-segment_time", str(NUM_FRAMES / FPS), "-reset_timestamps", "1"]
    command += ["-segment_format_options", "movflags=+faststart", str(folder / "%d.mp4")]
    with tempfile.TemporaryFile() as errors:
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=errors) as process:
            assert process.stdin is not None
            try:
                for frames_FHWC in clips:
                    process.stdin.write(np.ascontiguousarray(frames_FHWC).data)
                process.stdin.close()
            except BrokenPipeError:
                pass  # ffmpeg has ended early and said why
        if process.returncode:
            errors.seek(0)
            raise DataError(f"ffmpeg could not write the moving shapes: {errors.read().decode().strip()[:200]}")
