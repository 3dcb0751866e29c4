"""Which frames of a clip are taken, and how they become a uint8 tensor.

Shapes: F frames, C channels, H height, W width.
"""

import hashlib
import io
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image
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
            frames_FHWC = _decode_jpegs(pictures, settings, random)
        else:
            frames_FHWC = _decode_video(pictures[0], settings, random)
    except Exception as error:  # decord raises several unrelated types
        raise DataError(f"cannot decode: {str(error).strip().splitlines()[0]}") from None
    frames_FCHW = torch.from_numpy(frames_FHWC).permute(0, 3, 1, 2)
    if random is None:
        return resize(centre_square(frames_FCHW), settings.size)
    if settings.crop_scale != (1.0, 1.0):
        frames_FCHW = random_crop(frames_FCHW, settings.crop_scale, random)
    else:
        frames_FCHW = centre_square(frames_FCHW)
    frames_FCHW = resize(frames_FCHW, settings.size)
    if settings.flip and random.random() < 0.5:
        frames_FCHW = frames_FCHW.flip(-1)
    return frames_FCHW


def _is_jpeg(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8")


def _decode_video(video: bytes, settings: FrameSettings, random: Generator | None) -> NDArray[np.uint8]:
    import decord  # opens threads: imported in the process that decodes, never before a fork

    reader = decord.VideoReader(io.BytesIO(video), num_threads=1)
    indices = frame_indices(len(reader), settings.segments, settings.chunks, random)
    unique, where = np.unique(indices, return_inverse=True)
    frames_FHWC: NDArray[np.uint8] = reader.get_batch(unique.tolist()).asnumpy()[where]
    return frames_FHWC


def _decode_jpegs(jpegs: list[bytes], settings: FrameSettings, random: Generator | None) -> NDArray[np.uint8]:
    indices = frame_indices(len(jpegs), settings.segments, settings.chunks, random)
    frames = {i: np.asarray(Image.open(io.BytesIO(jpegs[i])).convert("RGB")) for i in set(indices)}
    return np.stack([frames[i] for i in indices])


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
    """Bicubic with antialiasing to a square, rounded to uint8 (CLIP's own preprocessing, on a whole clip)."""
    if frames_FCHW.shape[-2:] == (size, size):
        return frames_FCHW.contiguous()
    resized = interpolate(frames_FCHW.float(), (size, size), mode="bicubic", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)
