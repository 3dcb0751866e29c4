import json
from collections import Counter
from pathlib import Path

import decord
import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from common.config import validate
from common.errors import ConfigError, StorageError
from datasets_prep import video
from datasets_prep.config import BuildConfig, MovingShapesConfig, VideoConfig
from datasets_prep.plan import Clip
from datasets_prep.sources import moving_shapes
from datasets_prep.sources.moving_shapes import MEANINGS, NUM_FRAMES, captions_of, draw_pairs, render

MIDDLES = list(range(2, NUM_FRAMES, 5))  # of six segments


def config(videos: Path | str, **changes: int) -> MovingShapesConfig:
    numbers = {"num_pairs": 14, "val_pairs": 3, "test_pairs": 8, **changes}
    return MovingShapesConfig(videos=str(videos), **numbers)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def clips(shapes: Path) -> list[Clip]:
    return moving_shapes.read(config(shapes))


def decode(path: Path) -> NDArray[np.uint8]:
    reader = decord.VideoReader(str(path))
    return reader.get_batch(range(len(reader))).asnumpy()


def twins(clips: list[Clip]) -> list[tuple[Clip, Clip]]:
    by_group: dict[str, list[Clip]] = {}
    for clip in clips:
        by_group.setdefault(clip.source_id, []).append(clip)
    return [(first, second) for first, second in by_group.values()]


def test_twins_are_exact_reversals_also_in_the_dataset(clips: list[Clip], shapes: Path, tmp_path: Path) -> None:
    for pair in twins(clips):
        frames = []
        for clip in pair:
            info = video.convert(shapes / clip.video, tmp_path / "out.mp4", VideoConfig(), None, None)
            assert (info.num_frames, info.fps, info.longest_gop) == (NUM_FRAMES, 10.0, 1)
            frames.append(decode(tmp_path / "out.mp4"))
            assert np.array_equal(frames[-1], decode(shapes / clip.video))  # copied as it is
        forwards, backwards = frames
        assert np.array_equal(forwards, backwards[::-1])
        assert not np.array_equal(forwards, backwards)
        middles = [sorted(f.tobytes() for f in frames[i][MIDDLES]) for i in (0, 1)]
        assert middles[0] == middles[1]
        assert pair[0].split == pair[1].split
        assert pair[0].captions != pair[1].captions


def test_frames_are_what_was_drawn(clips: list[Clip], shapes: Path) -> None:
    """The first clip decodes to its drawing, but for the halved resolution of colour in 4:2:0."""
    pair = draw_pairs(config(shapes))[0]
    drawn = render(pair.meaning, 64, np.random.default_rng([0, 1, 0])).astype(int)
    decoded = decode(shapes / clips[0].video).astype(int)
    assert clips[0].captions == (pair.captions[0],)
    assert abs(drawn - decoded).mean() < 6
    profile = "h264 (High 4:4:4 Intra)"  # lossless, and a profile that has no other frames
    assert profile in video._run(["-i", str(shapes / clips[0].video)], VideoConfig())[1]


def centres(frames_FHWC: NDArray[np.uint8]) -> tuple[list[float], list[float], list[float]]:
    """Of what is brighter than any background: x, y and area per frame."""
    bright = frames_FHWC.max(-1) > 150
    where = [np.nonzero(b) for b in bright]
    return [w[1].mean() for w in where], [w[0].mean() for w in where], [float(b.sum()) for b in bright]


@pytest.mark.parametrize("meaning", [m for m in MEANINGS if m[:2] in (("square", "red"), ("cross", "blue"))])
def test_the_caption_says_what_happens(meaning: moving_shapes.Meaning) -> None:
    frames = render(meaning, 64, np.random.default_rng(5))
    for caption, clip in zip(captions_of(meaning), [frames, frames[::-1]], strict=True):
        x, y, area = centres(clip)
        _, colour, shape, *motion = caption.split()
        assert (shape, colour) == meaning[:2]
        if motion in (["grows"], ["shrinks"]):
            assert (area[-1] > area[0]) == (motion == ["grows"])
            continue
        legs = " ".join(motion).removeprefix("moves ").split(" and then ")
        bounds = np.linspace(0, NUM_FRAMES - 1, len(legs) + 1).round().astype(int)
        for leg, first, last in zip(legs, bounds, bounds[1:], strict=False):
            values, low = (x, "left") if "left" in leg else (y, "top")
            assert (values[last] > values[first] + 20) == leg.startswith(f"from {low}"), caption


def test_reversed_sentences() -> None:
    config("x", test_pairs=len(MEANINGS))
    with pytest.raises(ValidationError):  # the limit in the config is the number of sentences
        config("x", test_pairs=len(MEANINGS) + 1)
    sentences = [c for m in MEANINGS for c in captions_of(m)]
    assert len(set(sentences)) == 2 * len(MEANINGS)
    by_first = {captions_of(m)[0]: captions_of(m)[1] for m in MEANINGS}
    assert by_first["a red square moves from left to right"] == "a red square moves from right to left"
    assert by_first["a green circle grows"] == "a green circle shrinks"
    a = "a red cross moves from left to right and then from bottom to top"
    assert by_first[a] == "a red cross moves from top to bottom and then from right to left"


def test_no_caption_twice_in_val_and_test() -> None:
    pairs = draw_pairs(config("x", num_pairs=280, val_pairs=40, test_pairs=112))
    assert Counter(p.split for p in pairs) == {"train": 280, "val": 40, "test": 112}

    def counts(split: str) -> Counter[str]:
        return Counter(c for p in pairs if p.split == split for c in p.captions)

    assert set(counts("val").values()) == set(counts("test").values()) == {1}
    assert set(counts("train").values()) == {2, 3}


def test_more_test_pairs_than_captions_are_refused() -> None:
    values = {"source": {"name": "moving_shapes", "videos": "x", "test_pairs": 113}, "output": "y"}
    with pytest.raises(ConfigError, match=r"source\.test_pairs=113"):
        validate(BuildConfig, values)


def test_written_once_deterministic_and_never_mixed(clips: list[Clip], shapes: Path, tmp_path: Path) -> None:
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in shapes.iterdir()}
    assert moving_shapes.read(config(shapes)) == clips
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in shapes.iterdir()} == before
    moving_shapes.read(config(tmp_path / "again"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "again").iterdir()} == {k: v[1] for k, v in before.items()}
    with pytest.raises(ConfigError, match="holds moving shapes of another size, number or seed"):
        moving_shapes.read(config(shapes, seed=1))
    with pytest.raises(StorageError, match="local or shared folder"):
        moving_shapes.read(config("s3://bucket/x"))


def test_an_interrupted_writing_is_done_again(clips: list[Clip], shapes: Path, tmp_path: Path) -> None:
    folder = tmp_path / "half"
    folder.mkdir()
    (folder / clips[0].video).write_bytes(b"half a file")  # without the marker
    moving_shapes.read(config(folder))
    assert (folder / clips[0].video).read_bytes() == (shapes / clips[0].video).read_bytes()


def test_annotations_are_in_the_custom_format(clips: list[Clip], shapes: Path) -> None:
    lines = [json.loads(line) for line in (shapes / "annotations.jsonl").read_text().splitlines()]
    assert [line["video"] for line in lines] == [c.video for c in clips]
    assert all(set(line) == {"video", "caption", "split", "group"} for line in lines)


def test_clips_of_one_caption_look_different() -> None:
    first, second = (render(MEANINGS[0], 64, np.random.default_rng(seed)) for seed in (0, 1))
    assert abs(first.astype(int) - second).mean() > 3
