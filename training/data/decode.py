"""Which frames of a clip are taken, and how they become a uint8 tensor.

Shapes: F frames, U those that differ, C channels, H height, W width.
"""

import hashlib
import io
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
from numpy.random import Generator
from torch import Tensor
from torch.nn.functional import interpolate

from common.errors import DataError


class FrameSettings(NamedTuple):
    """How a clip is sampled and cropped.

    `segments` equal parts of the clip, one frame from each for each of `chunks`; frames come chunk by chunk, so that
    every chunk spans the whole clip (the official sampler's order). `size` is the side of the square in pixels.
    """

    segments: int
    chunks: int
    size: int
    crop_scale: tuple[float, float] = (1.0, 1.0)
    flip: bool = False


def draws(seed: int, epoch: int, video_id: str) -> Generator:
    """The random numbers of one sample in one epoch: the same on any rank, worker and restart."""
    return np.random.default_rng([seed, epoch, stable_hash(video_id)])


def stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def frame_indices(num_frames: int, segments: int, chunks: int, random: Generator | None) -> list[int]:
    """Frame numbers, chunk by chunk.

    Segment s covers [s, s+1) * num_frames / segments. With `random`, each chunk draws uniformly from the whole of
    every segment; without, chunk i of K takes the point (i+1)/(K+1) of it: the middle for K = 1. A clip with fewer
    frames than asked for repeats frames.
    """
    within = np.tile(np.arange(1, chunks + 1)[:, None] / (chunks + 1), (1, segments))
    if random is not None:
        within = random.random((chunks, segments))
    positions = (np.arange(segments) + within) * (num_frames / segments)
    return np.minimum(positions.astype(np.int64), num_frames - 1).ravel().tolist()


def decode_clip(pictures: list[bytes], settings: FrameSettings, random: Generator | None = None) -> Tensor:
    """A clip's sampled frames, uint8 FCHW with F = chunks * segments; `random` makes it a training draw.

    Args:
        pictures: one video, or JPEGs that are evenly spaced in time (the payload `frames`).

    Raises:
        DataError: the bytes can't be decoded.
    """
    try:
        if _is_jpeg(pictures[0]):
            frames_UHWC, where_F = _decode_jpegs(pictures, settings, random)
        else:
            frames_UHWC, where_F = _decode_video(pictures[0], settings, random)
    except Exception as error:  # decord raises several unrelated types
        raise DataError(f"cannot decode: {str(error).strip().splitlines()[0]}") from None
    frames_UCHW = frames_UHWC.permute(0, 3, 1, 2)
    if random is not None and settings.crop_scale != (1.0, 1.0):
        frames_UCHW = random_crop(frames_UCHW, settings.crop_scale, random)
    else:
        frames_UCHW = centre_square(frames_UCHW)
    frames_FCHW = resize(frames_UCHW, settings.size).index_select(0, where_F)  # contiguous
    if random is not None and settings.flip and random.random() < 0.5:
        frames_FCHW = frames_FCHW.flip(-1)
    return frames_FCHW


def _is_jpeg(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8")


def _decode_video(video: bytes, settings: FrameSettings, random: Generator | None) -> tuple[Tensor, Tensor]:
    """The frames that differ, and which of them each sampled frame is."""
    import decord  # opens threads: imported in the process that decodes, never before a fork

    reader = decord.VideoReader(io.BytesIO(video), num_threads=1)
    indices = frame_indices(len(reader), settings.segments, settings.chunks, random)
    unique, where = np.unique(indices, return_inverse=True)
    frames_UHWC = torch.from_dlpack(reader.get_batch(unique.tolist()).to_dlpack())  # without a copy
    return frames_UHWC, torch.from_numpy(where)


def _decode_jpegs(jpegs: list[bytes], settings: FrameSettings, random: Generator | None) -> tuple[Tensor, Tensor]:
    indices = frame_indices(len(jpegs), settings.segments, settings.chunks, random)
    unique, where = np.unique(indices, return_inverse=True)
    # Its defaults, exact DCT and smooth colours, give Pillow's very pixels; fastupsample is off by up to 70 of 255.
    frames_UHWC = np.stack([simplejpeg.decode_jpeg(jpegs[i]) for i in unique])
    return torch.from_numpy(frames_UHWC), torch.from_numpy(where)


def centre_square(frames_FCHW: Tensor) -> Tensor:
    height, width = frames_FCHW.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return frames_FCHW[..., top : top + side, left : left + side]


def random_crop(frames_FCHW: Tensor, scale: tuple[float, float], random: Generator) -> Tensor:
    """One crop for all frames of a clip: a share of the area in `scale`, aspect ratio in [3/4, 4/3] (log-uniform)."""
    height, width = frames_FCHW.shape[-2:]
    area = height * width * random.uniform(*scale)
    ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
    crop_w = min(width, max(1, round(np.sqrt(area * ratio))))
    crop_h = min(height, max(1, round(np.sqrt(area / ratio))))
    top = int(random.integers(height - crop_h + 1))
    left = int(random.integers(width - crop_w + 1))
    return frames_FCHW[..., top : top + crop_h, left : left + crop_w]


def resize(frames_FCHW: Tensor, size: int) -> Tensor:
    """uint8 → uint8, bicubic with antialiasing to a square: Pillow's pixels, CLIP's own preprocessing, to within 1.

    torch has a fast kernel for this, in whole numbers as Pillow's, where the channels lie last in memory, as decoders
    leave them.
    """
    if frames_FCHW.shape[-2:] != (size, size):
        frames_FCHW = frames_FCHW.contiguous(memory_format=torch.channels_last)
        frames_FCHW = interpolate(frames_FCHW, (size, size), mode="bicubic", antialias=True)
    return frames_FCHW
