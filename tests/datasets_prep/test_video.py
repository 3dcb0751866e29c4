import hashlib
import io
import subprocess
import time
from pathlib import Path

import decord
import numpy as np
import pytest
from PIL import Image

from common.errors import DataError, RunError
from datasets_prep import video
from datasets_prep.config import FramesConfig, VideoConfig
from tests.datasets_prep.conftest import SOUND, ffmpeg, picture

CONFIG = VideoConfig(short_side=64, gop=6)


def convert(source: Path, tmp_path: Path, config: VideoConfig = CONFIG, **span: float) -> video.VideoInfo:
    return video.convert(source, tmp_path / "out.mp4", config, span.get("start"), span.get("end"))


def test_transcodes_to_small_short_gops_without_sound(videos: Path, tmp_path: Path) -> None:
    info = convert(videos / "wide.mp4", tmp_path)
    assert (info.width, info.height, info.fps, info.num_frames) == (114, 64, 30.0, 60)
    assert info.duration_s == 2.0
    assert info.longest_gop == 6
    stream = video.probe(tmp_path / "out.mp4", CONFIG)
    assert (stream.codec, stream.pixels) == ("h264", "yuv420p")
    assert "Audio:" in video._run(["-i", str(videos / "wide.mp4")], CONFIG)[1]
    assert "Audio:" not in video._run(["-i", str(tmp_path / "out.mp4")], CONFIG)[1]


def test_index_is_at_the_front(videos: Path, tmp_path: Path) -> None:
    for name in ("wide.mp4", "small.mp4"):  # made anew, copied
        convert(videos / name, tmp_path)
        data = (tmp_path / "out.mp4").read_bytes()
        assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize(("name", "size"), [("tall.webm", (64, 106)), ("odd.avi", (86, 64))])
def test_short_side_of_any_shape_and_container(videos: Path, tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    info = convert(videos / name, tmp_path)
    assert (info.width, info.height) == size


def test_never_enlarges_nor_speeds_up(videos: Path, tmp_path: Path) -> None:
    info = convert(videos / "odd.avi", tmp_path, VideoConfig(short_side=200))
    assert (info.width, info.height, info.fps) == (100, 74, 10.0)


def frames(path: Path) -> bytes:
    reader = decord.VideoReader(str(path))
    return reader.get_batch(range(len(reader))).asnumpy().tobytes()


def test_copies_what_is_small_enough_already(videos: Path, tmp_path: Path) -> None:
    info = convert(videos / "small.mp4", tmp_path)
    assert info.longest_gop == 5
    assert frames(tmp_path / "out.mp4") == frames(videos / "small.mp4")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("long_gop.mp4", CONFIG),
        ("small.mp4", CONFIG.model_copy(update={"gop": 4})),
        ("small.mp4", CONFIG.model_copy(update={"short_side": 40})),
        ("small.mp4", CONFIG.model_copy(update={"max_fps": 5.0})),
    ],
)
def test_makes_anew_what_is_not(videos: Path, tmp_path: Path, name: str, config: VideoConfig) -> None:
    info = convert(videos / name, tmp_path, config)
    assert info.longest_gop <= config.gop
    assert min(info.width, info.height) <= config.short_side
    assert info.fps <= config.max_fps
    assert frames(tmp_path / "out.mp4") != frames(videos / name)


def test_cuts_a_span(videos: Path, tmp_path: Path) -> None:
    config = VideoConfig(short_side=64, max_fps=50, crf=0)
    info = convert(videos / "wide.mp4", tmp_path, config, start=0.5, end=1.1)
    assert (info.num_frames, info.duration_s) == (30, 0.6)
    cut = decord.VideoReader(str(tmp_path / "out.mp4"))[0].asnumpy().astype(int)
    convert(videos / "wide.mp4", tmp_path, config)
    whole = decord.VideoReader(str(tmp_path / "out.mp4"))
    distances = [abs(whole[i].asnumpy().astype(int) - cut).mean() for i in range(100)]
    assert min(range(100), key=distances.__getitem__) == 25


def test_a_turned_phone_video_is_upright(videos: Path, tmp_path: Path) -> None:
    turned = tmp_path / "turned.mp4"
    ffmpeg("-display_rotation", "90", "-i", str(videos / "small.mp4"), "-c", "copy", str(turned))
    assert not video.probe(turned, CONFIG).is_as_shown
    info = convert(turned, tmp_path)
    assert (info.width, info.height) == (64, 96)
    assert video.probe(tmp_path / "out.mp4", CONFIG).is_as_shown  # upright pixels: not every decoder turns them


def test_pixels_that_are_not_square_are_made_so(videos: Path, tmp_path: Path) -> None:
    wide = tmp_path / "wide.mp4"
    ffmpeg("-i", str(videos / "small.mp4"), "-c", "copy", "-aspect", "3:1", str(wide))  # shown as 192x64
    info = convert(wide, tmp_path)
    assert (info.width, info.height) == (192, 64)


DASH = """<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"
mediaPresentationDuration="PT2S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period><AdaptationSet
mimeType="video/mp4"><Representation id="1" bandwidth="1000" codecs="avc1.64000a" width="96" height="64">
<BaseURL>{}</BaseURL></Representation></AdaptationSet></Period></MPD>"""
HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{}\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile {}\n"


@pytest.mark.parametrize(("name", "text"), [("a.mp4", DASH), ("a.m3u8", HLS), ("a.mp4", CONCAT), ("a.mp4", "<svg/>")])
def test_a_list_of_other_files_is_no_video(videos: Path, tmp_path: Path, name: str, text: str) -> None:
    """It could name any file of the node. Seen to fail without `-format_whitelist`."""
    secret = tmp_path / "secret.mp4"
    secret.write_bytes((videos / "small.mp4").read_bytes())
    (tmp_path / name).write_text(text.format("secret.mp4" if text == CONCAT else secret))
    with pytest.raises(DataError, match="not a video: a playlist, a picture or the like"):
        convert(tmp_path / name, tmp_path)


STREAM = "  Stream #0:0: Video: h264 (High), yuv420p, 96x64, 10 fps"


@pytest.mark.parametrize("payload", ["video", "frames"])
def test_a_title_or_a_name_that_reads_like_a_stream(videos: Path, tmp_path: Path, payload: str) -> None:
    """Seen to fail without the `^` of each pattern, and for a copy without the look at what was copied."""
    source = tmp_path / f"x\n{STREAM}.mp4"
    title = ["-metadata", f"title={STREAM}\n  Duration: 99:00:00.00, start: 0"]
    ffmpeg("-i", str(videos / "wide.mp4"), *title, "-an", "-g", "5", str(tmp_path / "titled.mp4"))
    source.write_bytes((tmp_path / "titled.mp4").read_bytes())
    for name in (tmp_path / "titled.mp4", source):
        if payload == "video":
            info = convert(name, tmp_path)
        else:
            info, _ = video.convert_to_frames(name, tmp_path, CONFIG, FramesConfig(), None, None)
        assert (info.width, info.height) == (114, 64)
        assert info.fps == (10.0 if name == source else 30.0)  # a name gains no more than its own clip's frames


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("empty.mp4", "the file is empty"),
        ("garbage.mp4", "not a video: moov atom not found"),
        ("cut.mp4", "not a video: moov atom not found"),
        ("sound.mp4", "no video stream in it, only sound"),
    ],
)
def test_rejects_bad_files_with_a_reason(videos: Path, tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(DataError) as caught:
        convert(videos / name, tmp_path)
    assert str(caught.value).startswith(reason)
    assert str(tmp_path) not in str(caught.value)


def test_rejects_a_song_with_a_cover(videos: Path, tmp_path: Path) -> None:
    cover, song = tmp_path / "cover.png", tmp_path / "song.mp4"
    ffmpeg(*picture("64x64", 1, 1), "-frames:v", "1", str(cover))
    maps = ["-map", "0", "-map", "1", "-c:v", "png", "-disposition:v:0", "attached_pic"]
    ffmpeg(*SOUND, "-i", str(cover), *maps, str(song))
    with pytest.raises(DataError, match="only sound"):
        convert(song, tmp_path)


def test_rejects_a_span_after_the_end(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it would begin after the end of the video"):
        convert(videos / "small.mp4", tmp_path, start=5.0, end=6.0)


def test_a_broken_frame_is_found_or_made_whole(videos: Path, tmp_path: Path) -> None:
    """What leaves `convert` decodes from end to end, also when a middle part of the file is overwritten."""
    data = bytearray((videos / "small.mp4").read_bytes())
    middle = data.index(b"mdat") + 3000
    data[middle : middle + 2000] = b"\x55" * 2000
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(data)
    try:
        info = convert(broken, tmp_path)
    except DataError:
        return
    assert len(frames(tmp_path / "out.mp4")) == info.num_frames * info.height * info.width * 3


def test_an_endless_ffmpeg_is_killed(videos: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    endless = ["-v", "error", "-re", "-f", "lavfi", "-i", "testsrc2=duration=600", "-f", "null", "-"]
    with pytest.raises(RunError, match=r"did not end within video.timeout_s=0.5"):  # perhaps the machine is slow
        video._run(endless, CONFIG.model_copy(update={"timeout_s": 0.5}))
    assert time.monotonic() - began < 300  # it would have gone on for 600 s


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("kill -9 $$", "ffmpeg was killed"),
        ("exit 255", "ffmpeg was killed"),  # its own answer to SIGTERM
        ("echo 'av_write: No space left on device' >&2; exit 1", "no space left"),
    ],
)
def test_a_fault_of_the_node_rejects_no_clip(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    program = tmp_path / "ffmpeg"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(video.imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(program))
    with pytest.raises(RunError, match=f"{message}.*run again to go on"):
        video.convert(videos / "small.mp4", tmp_path / "out.mp4", VideoConfig(), None, None)


@pytest.mark.parametrize(
    ("bound", "reason"),
    [
        ({"max_pixels": 640 * 360 - 1}, "more than video.max_pixels=230399 in a frame"),
        ({"max_duration_s": 1.5}, "longer than video.max_duration_s=1.5"),
        ({"min_frames": 61}, "fewer than video.min_frames=61 frames"),
        ({"max_bytes": 3000}, "becomes larger than video.max_bytes=3000"),
    ],
)
@pytest.mark.parametrize("payload", ["video", "frames"])
def test_bounds_depend_on_the_file_alone(
    videos: Path, tmp_path: Path, bound: dict[str, float], reason: str, payload: str
) -> None:
    config = CONFIG.model_copy(update=bound)
    with pytest.raises(DataError, match=f"^{reason}$"):
        if payload == "video":
            convert(videos / "wide.mp4", tmp_path, config)
        else:
            video.convert_to_frames(videos / "wide.mp4", tmp_path, config, FramesConfig(), None, None)
    if "in a frame" in reason or "longer" in reason:  # as its header says: it is not even begun
        assert not list(tmp_path.iterdir())


def test_frames_are_bounded_by_their_own_bytes(videos: Path, tmp_path: Path) -> None:
    """Not by those of the lossless video that they are taken from."""
    _, jpegs = video.convert_to_frames(videos / "wide.mp4", tmp_path, CONFIG, FramesConfig(), None, None)
    size = sum(map(len, jpegs))
    assert (tmp_path / "lossless.mp4").stat().st_size > size
    config = CONFIG.model_copy(update={"max_bytes": size})
    assert video.convert_to_frames(videos / "wide.mp4", tmp_path, config, FramesConfig(), None, None)[1] == jpegs


def test_a_span_of_a_long_video_may_be_short(videos: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"max_duration_s": 1.0})
    assert convert(videos / "wide.mp4", tmp_path, config, start=0.5, end=1.5).num_frames == 30
    with pytest.raises(DataError, match="longer than"):
        convert(videos / "wide.mp4", tmp_path, config, start=0.5)


def piped(source: Path) -> bytes:
    command = [video.imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(source), "-c", "copy"]
    return subprocess.run([*command, "-f", "matroska", "-live", "1", "-"], stdout=subprocess.PIPE, check=True).stdout


def test_a_header_that_tells_nothing_is_bounded_too(tmp_path: Path) -> None:
    """A stream without a duration, and one whose time stamps jump by hours: filled up, it would have 10^6 frames."""
    ffmpeg(*picture("96x64", 10, 3), "-c:v", "libx264", "-f", "h264", str(tmp_path / "raw.h264"))
    assert video.probe(tmp_path / "raw.h264", CONFIG).duration_s is None
    with pytest.raises(DataError, match=r"longer than video.max_duration_s=1$"):
        convert(tmp_path / "raw.h264", tmp_path, CONFIG.model_copy(update={"max_duration_s": 1.0, "max_fps": 5.0}))
    jump = ["-vf", "settb=1/10,setpts='N+if(gt(N,9),100000*10,0)'", "-enc_time_base", "1/10", "-fps_mode", "vfr"]
    ffmpeg(*picture("96x64", 10, 3), *jump, "-c:v", "libx264", str(tmp_path / "jump.mkv"))
    with pytest.raises(DataError, match=r"longer than video.max_duration_s=1800$"):
        convert(tmp_path / "jump.mkv", tmp_path)
    # Written to a pipe the same has no duration in its header: no more is filled up than the bound.
    (tmp_path / "pipe.mkv").write_bytes(piped(tmp_path / "jump.mkv"))
    assert video.probe(tmp_path / "pipe.mkv", CONFIG).duration_s is None
    with pytest.raises(DataError, match=r"longer than video.max_duration_s=2$"):
        convert(tmp_path / "pipe.mkv", tmp_path, CONFIG.model_copy(update={"max_duration_s": 2.0}))
    assert len(decord.VideoReader(str(tmp_path / "out.mp4"))) == 2 * 10 + 1


def test_cpu_time_is_bounded(tmp_path: Path) -> None:
    work = ["-v", "error", "-f", "lavfi", "-i", "mandelbrot=size=1280x720", "-f", "null", "-"]
    with pytest.raises(DataError, match=r"takes more than video.max_cpu_s=1 CPU seconds"):
        video._run(work, CONFIG.model_copy(update={"max_cpu_s": 1}))


def test_frames_are_the_middles_of_equal_parts(tmp_path: Path) -> None:
    """Grey levels that rise with time tell which frames were taken."""
    ffmpeg("-f", "lavfi", "-i", "nullsrc=s=96x64:r=10:d=6,format=gray,geq=lum='4*N'", "-pix_fmt", "yuv420p",
           "-qp", "0", str(tmp_path / "grey.mp4"))  # fmt: skip
    settings = FramesConfig(segments=5, per_segment=2)
    info, jpegs = video.convert_to_frames(tmp_path / "grey.mp4", tmp_path, CONFIG, settings, None, None)
    levels = [np.asarray(Image.open(io.BytesIO(jpeg)).convert("L")).mean() for jpeg in jpegs]
    assert (info.num_frames, len(jpegs)) == (60, 10)
    steps = np.diff(levels)
    assert steps.min() > 0 and steps.max() - steps.min() < 0.2 * steps.mean()  # evenly spaced
    assert 0.3 < levels[0] / steps.mean() < 0.7  # half a step from the beginning
    assert levels[0] < steps.mean() and levels[-1] > levels[0] + 8.5 * steps.mean()  # from end to end


@pytest.mark.parametrize("name", ["wide.mp4", "small.mp4"])
def test_same_input_same_bytes(videos: Path, tmp_path: Path, name: str) -> None:
    digests = set()
    for _ in range(2):
        convert(videos / name, tmp_path)
        digests.add(hashlib.sha256((tmp_path / "out.mp4").read_bytes()).hexdigest())
    assert len(digests) == 1
