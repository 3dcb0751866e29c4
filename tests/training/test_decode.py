"""Which frames are taken, and how they become pixels."""

import io
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from common.errors import DataError
from training.data.decode import FrameSettings, decode_clip, draws, frame_indices, random_crop, resize


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """30 grey frames, frame n of brightness 8 n, 64 x 48."""
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    frames = np.repeat(np.arange(30, dtype=np.uint8) * 8, 64 * 48 * 3).tobytes()
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", "64x48", "-r", "10"]
    command += ["-i", "-", "-c:v", "libx264", "-qp", "0", "-pix_fmt", "yuv444p", str(path)]
    subprocess.run(command, input=frames, check=True, capture_output=True)
    return path.read_bytes()


def brightness(frames: torch.Tensor) -> list[int]:
    return [round(x / 8) for x in frames.float().mean(dim=(1, 2, 3)).tolist()]


def test_evaluation_takes_the_middle_of_each_segment(clip: bytes):
    assert frame_indices(30, 6, 1, None) == [2, 7, 12, 17, 22, 27]
    frames = decode_clip([clip], FrameSettings(6, 1, 32))
    assert frames.shape == (6, 3, 32, 32) and frames.dtype == torch.uint8
    assert brightness(frames) == [2, 7, 12, 17, 22, 27]


def test_chunks_are_interleaved_so_that_each_spans_the_clip(clip: bytes):
    # Two chunks take the third points of each segment of ten frames.
    assert frame_indices(60, 6, 2, None) == [3, 13, 23, 33, 43, 53, 6, 16, 26, 36, 46, 56]
    assert brightness(decode_clip([clip], FrameSettings(3, 2, 16))) == [3, 13, 23, 6, 16, 26]


def test_middle_frames_of_a_clip_and_its_reversal_are_the_same_set():
    middle = frame_indices(30, 6, 1, None)
    assert sorted(29 - i for i in middle) == middle


def test_the_training_draw_covers_every_frame_of_every_segment():
    seen = [set() for _ in range(6)]
    for epoch in range(300):
        for segment, index in enumerate(frame_indices(30, 6, 1, draws(0, epoch, "a"))):
            seen[segment].add(index)
    assert seen == [set(range(5 * s, 5 * s + 5)) for s in range(6)]


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 3), st.booleans())
def test_clips_shorter_than_the_draw_repeat_frames(num_frames: int, segments: int, chunks: int, train: bool):
    indices = frame_indices(num_frames, segments, chunks, draws(0, 0, "a") if train else None)
    assert len(indices) == segments * chunks
    assert all(0 <= i < num_frames for i in indices)
    for start in range(0, len(indices), segments):
        assert indices[start : start + segments] == sorted(indices[start : start + segments])


def test_a_draw_depends_on_seed_epoch_and_video_only(clip: bytes):
    settings = FrameSettings(6, 1, 32, (0.5, 1.0), flip=True)
    first = decode_clip([clip], settings, draws(0, 3, "a"))
    assert torch.equal(first, decode_clip([clip], settings, draws(0, 3, "a")))
    for other in (draws(1, 3, "a"), draws(0, 4, "a"), draws(0, 3, "b")):
        assert not torch.equal(first, decode_clip([clip], settings, other))


def test_crop_takes_a_share_of_the_area_and_one_window_for_all_frames():
    ramp = torch.arange(48 * 64).reshape(1, 1, 48, 64).expand(3, 3, 48, 64)
    for seed in range(50):
        crop = random_crop(ramp, (0.5, 1.0), np.random.default_rng(seed))
        assert 0.4 < crop.shape[-1] * crop.shape[-2] / (48 * 64) <= 1
        assert torch.equal(crop[0], crop[2])


def test_resize_keeps_a_constant_and_stays_in_range():
    checker = ((torch.arange(64)[:, None] + torch.arange(64)) % 2 * 255).to(torch.uint8).expand(2, 3, 64, 64)
    small = resize(checker, 20)
    assert small.dtype == torch.uint8 and small.shape == (2, 3, 20, 20)
    assert torch.equal(resize(torch.full((1, 3, 64, 64), 7, dtype=torch.uint8), 20), small.new_full((1, 3, 20, 20), 7))


def picture(height: int, width: int) -> Image.Image:
    """Noise on a coloured ramp: every frequency, and edges in colour."""
    rows, columns = np.mgrid[:height, :width]
    ramp = np.stack([rows * 255 // height, columns * 255 // width, (rows // 8 + columns // 8) % 2 * 255], axis=-1)
    noise = np.random.default_rng(0).integers(-40, 40, ramp.shape)
    return Image.fromarray((ramp + noise).clip(0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("size", [20, 97, 224])
def test_resize_gives_pillows_pixels_to_within_1(size: int):
    image = picture(113, 150)
    small = resize(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None], size)
    theirs = torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BICUBIC))).permute(2, 0, 1)
    assert (small[0].int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize("options", [{"subsampling": 2}, {"subsampling": 0}, {"progressive": 1}, {"quality": 30}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpegs_give_pillows_pixels_to_within_1(mode: str, options: dict[str, int]):
    data = jpeg(picture(97, 97).convert(mode), **options)
    frames = decode_clip([data], FrameSettings(1, 1, 97))
    theirs = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)
    # Another libjpeg may round otherwise. Faster settings of ours would be off by 9 (fastdct) to 70 (fastupsample).
    assert (frames[0].int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("size", [16, 48])
def test_jpegs_are_repeated_in_order_and_contiguous(size: int, flip: bool):
    jpegs = [jpeg(Image.new("RGB", (64, 48), (8 * n, 8 * n, 8 * n))) for n in (5, 9, 20)]
    frames = decode_clip(jpegs, FrameSettings(3, 2, size, flip=flip), draws(0, 2, "a"))
    assert brightness(frames) == [5, 9, 20, 5, 9, 20]
    assert frames.is_contiguous()


BROKEN = [
    jpeg(picture(48, 64))[:900],
    jpeg(picture(48, 64))[:-2],
    jpeg(picture(48, 64))[:20],
    b"\xff\xd8",
    b"\xff\xd8" + bytes(500),
]


@pytest.mark.parametrize("data", BROKEN)
def test_broken_jpegs_are_one_sentence(data: bytes):
    with pytest.raises(DataError, match=r"^cannot decode: [^\n]+$"):
        decode_clip([data], FrameSettings(6, 1, 32))


def test_jpegs_of_different_sizes_are_one_sentence():
    with pytest.raises(DataError, match=r"^cannot decode: [^\n]+$"):
        decode_clip([jpeg(picture(48, 64)), jpeg(picture(50, 64))], FrameSettings(2, 1, 32))


@pytest.mark.parametrize("data", [b"", b"not a video", bytes(5000)])
def test_what_cannot_be_decoded_is_one_sentence(data: bytes):
    with pytest.raises(DataError, match="cannot decode"):
        decode_clip([data], FrameSettings(6, 1, 32))
