"""Small real files: videos made by ffmpeg, good and bad."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import pytest

from cluster.local import RayCluster
from tests.datasets_prep.builds import Write, build_shapes, files


def ffmpeg(*arguments: str) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-y", *arguments]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def picture(size: str, rate: int, seconds: float) -> list[str]:
    return ["-f", "lavfi", "-i", f"testsrc2=size={size}:rate={rate}:duration={seconds}"]


SOUND = ["-f", "lavfi", "-i", "sine=duration=1"]


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with good files (wide, tall, odd, small, long_gop) and bad ones (empty, garbage, cut, sound)."""
    folder = tmp_path_factory.mktemp("videos")
    ffmpeg(*picture("640x360", 50, 2), *SOUND, "-pix_fmt", "yuv420p", str(folder / "wide.mp4"))
    ffmpeg(*picture("300x500", 20, 1), "-pix_fmt", "yuv420p", str(folder / "tall.webm"))
    ffmpeg(*picture("101x75", 10, 1), "-c:v", "mpeg4", str(folder / "odd.avi"))
    small, yuv = picture("96x64", 10, 2), ["-pix_fmt", "yuv420p"]
    ffmpeg(*small, *SOUND, *yuv, "-g", "5", str(folder / "small.mp4"))
    ffmpeg(*small, *yuv, "-g", "100", str(folder / "long_gop.mp4"))
    ffmpeg(*SOUND, str(folder / "sound.mp4"))
    (folder / "empty.mp4").touch()
    (folder / "garbage.mp4").write_bytes(bytes(range(256)) * 40)
    whole = (folder / "small.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])  # its index, at the end, is lost
    return folder


@pytest.fixture
def annotate(tmp_path: Path) -> Callable[..., str]:
    """Write lines (dicts) as JSONL; the file's path."""

    def write(*lines: dict[str, object] | str) -> str:
        path = tmp_path / "annotations.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
        return str(path)

    return write


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small set of moving shapes, written by the first build that asks for it."""
    return tmp_path_factory.mktemp("shapes") / "videos"


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory, shapes: Path, ray_local: RayCluster) -> Path:
    output = tmp_path_factory.mktemp("dataset")
    build_shapes(output, shapes)
    return output


@pytest.fixture
def copy(dataset: Path, tmp_path: Path) -> Path:
    for name, (_, data) in files(dataset).items():
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "copy" / name).write_bytes(data)
    return tmp_path / "copy"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a text, bytes or JSON value; the file's path."""

    def to(name: str, content: Any) -> str:
        path = tmp_path / name
        data = content if isinstance(content, str | bytes) else json.dumps(content)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return str(path)

    return to


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., str]:
    """Lay empty-looking videos of 100 bytes; their folder."""

    def lay(*names: str) -> str:
        for name in names:
            (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "videos" / name).write_bytes(b"x" * 100)
        return str(tmp_path / "videos")

    return lay
