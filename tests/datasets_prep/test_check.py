"""What a video may do to the decoder: the process that asks goes on, and knows whether the clip is at fault."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import DataError, RunError
from datasets_prep import check as check_module
from datasets_prep import video
from datasets_prep.check import check, check_apart
from datasets_prep.config import VideoConfig


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A decord of the test's own, for the process that is started next."""
    folder = tmp_path / "fake"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    stop()
    yield folder / "decord.py"
    stop()


def stop() -> None:
    check_module._process().communicate()
    check_module._process.cache_clear()


LOGGING = "import os, signal, time\nclass logging: QUIET, set_level = 0, id\n"
CRASH = LOGGING + "def VideoReader(*a, **k): os.kill(os.getpid(), signal.SIGSEGV)"
KILLED = LOGGING + "def VideoReader(*a, **k): os.kill(os.getpid(), signal.SIGKILL)"
SPIN = LOGGING + "def VideoReader(*a, **k):\n    while True: pass"
SLEEP = LOGGING + "def VideoReader(*a, **k): time.sleep(1000)"
RAISED = LOGGING + "def VideoReader(*a, **k): raise RuntimeError('[12:01:02] /x/reader.cc:270: bad atom at 0x1f of 77')"
SILENT = LOGGING + "def VideoReader(*a, **k): raise MemoryError"


@pytest.mark.parametrize("every_frame", [True, False])
def test_says_the_same_as_within_the_process(videos: Path, every_frame: bool) -> None:
    for name in ("wide.mp4", "small.mp4"):
        info = check_apart(videos / name, every_frame, VideoConfig())
        assert info == check(videos / name, every_frame)
    with pytest.raises(DataError, match="cannot be decoded"):
        check_apart(videos / "garbage.mp4", every_frame, VideoConfig())


@pytest.mark.parametrize(
    ("decoder", "bound", "error", "message"),
    [
        (CRASH, {}, DataError, "cannot be decoded: decord ends with SIGSEGV"),
        (SPIN, {"max_cpu_s": 1}, DataError, "takes more than video.max_cpu_s=1 CPU seconds"),
        (SLEEP, {"timeout_s": 1.0}, RunError, "decord did not end within video.timeout_s=1"),
        (KILLED, {}, RunError, "ended with -9: run again"),
    ],
)
def test_a_decoder_that_fails_takes_nothing_down(
    videos: Path, fake: Path, decoder: str, bound: dict[str, float], error: type[Exception], message: str
) -> None:
    fake.write_text(decoder)
    config = VideoConfig().model_copy(update=bound)
    with pytest.raises(error, match=message):
        check_apart(videos / "small.mp4", True, config)
    fake.unlink()  # the real one again, in a new process
    assert check_apart(videos / "small.mp4", True, VideoConfig()).num_frames == 20


def test_a_reason_is_the_same_for_many_files(videos: Path, fake: Path) -> None:
    """Without numbers of the one file; and what is raised without a word has a reason, too."""
    fake.write_text(RAISED)
    with pytest.raises(DataError, match=r"^cannot be decoded: bad atom at N of N$"):
        check_apart(videos / "small.mp4", True, VideoConfig())
    stop()
    fake.write_text(SILENT)
    with pytest.raises(DataError, match=r"^cannot be decoded: MemoryError$"):
        check_apart(videos / "small.mp4", True, VideoConfig())


def test_a_broken_stream_writes_nothing_to_the_log(videos: Path, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Of libav, in the middle of Ray's lines and the bar. Seen to fail without decord's level."""
    data = bytearray((videos / "small.mp4").read_bytes())
    middle = data.index(b"mdat") + 3000
    data[middle : middle + 2000] = b"\x55" * 2000
    (tmp_path / "broken.mp4").write_bytes(data)
    with contextlib.suppress(DataError):
        check(tmp_path / "broken.mp4", every_frame=True)
    assert capfd.readouterr().err == ""


def test_a_stream_that_crashes_the_decoder_is_made_anew(videos: Path, tmp_path: Path, fake: Path) -> None:
    """Checked in the process of the shard instead, it would be copied, or take the shard down."""
    copied, made = tmp_path / "copied.mp4", tmp_path / "made.mp4"
    video.convert(videos / "small.mp4", copied, VideoConfig(), None, None)
    stop()
    fake.write_text(CRASH)
    assert video.convert(videos / "small.mp4", made, VideoConfig(), None, None).num_frames == 20
    assert copied.read_bytes() != made.read_bytes()
