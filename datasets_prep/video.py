"""One video file → one small mp4 or JPEGs: probe, copy or transcode, check. The only user of ffmpeg on users' videos.

The static ffmpeg of imageio-ffmpeg comes without ffprobe, so probing reads what `ffmpeg -i` prints.
"""

import contextlib
import functools
import io
import math
import os
import re
import resource
import signal
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import imageio_ffmpeg

from common.errors import DataError, RunError
from datasets_prep.check import VideoInfo, check, check_apart, plain
from datasets_prep.config import FramesConfig, VideoConfig

# What holds a video itself. Others are playlists and scripts, which name further files, and pictures.
CONTAINERS = "mov,matroska,avi,mpegts,mpeg,mpegvideo,asf,flv,live_flv,ogg,rm,mxf,nut,ivf,dv,gif,h264,hevc,m4v,av1,obu"


class Probe(NamedTuple):
    """A file's first video stream; fps and duration are None where the file does not say."""

    codec: str
    pixels: str
    width: int
    height: int
    fps: float | None
    duration_s: float | None
    is_as_shown: bool  # not turned, and of square pixels


def convert(source: Path, target: Path, config: VideoConfig, start: float | None, end: float | None) -> VideoInfo:
    """Write the span [start, end) of `source`, in seconds, to `target` as config asks.

    A whole stream that is H.264 already, small and slow enough and with key frames close enough, is copied.

    Raises:
        DataError: the file can't be read as video or breaks a bound; the message is a reason that fits many files.
        RunError: the node is at fault, not the file.
    """
    stream = _examine(source, config, start, end)
    if start is None and end is None and _is_small(stream, config) and (copied := _copy(source, target, config)):
        return _within(copied, config)
    _encode(source, target, config, stream, start, end, _closed_groups(config))
    return _within(check(target, every_frame=False), config)


def convert_to_frames(
    source: Path, folder: Path, config: VideoConfig, frames: FramesConfig, start: float | None, end: float | None
) -> tuple[VideoInfo, list[bytes]]:
    """The middle frame of each of segments * per_segment equal parts of the span, as JPEGs; errors as `convert`."""
    import decord  # as in `check`
    from PIL import Image

    stream = _examine(source, config, start, end)
    between = folder / "lossless.mp4"  # of the frames' size and rate already, so that they are compressed once
    # Much larger than the JPEGs, which are what the sample holds; its length is bounded.
    roomy = config.model_copy(update={"max_bytes": 1 << 40})
    _encode(source, between, roomy, stream, start, end, ["-preset", "ultrafast", "-qp", "0", "-g", "12"])
    info = _within(check(between, every_frame=False), config)
    count = frames.segments * frames.per_segment
    indices = [(2 * i + 1) * info.num_frames // (2 * count) for i in range(count)]
    pictures = decord.VideoReader(str(between), num_threads=1).get_batch(indices).asnumpy()
    jpegs = []
    for picture in pictures:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=frames.quality)
        jpegs.append(buffer.getvalue())
    if sum(map(len, jpegs)) > config.max_bytes:
        raise _too_large(config)
    return info, jpegs


def probe(source: Path, config: VideoConfig) -> Probe:
    """The first video stream of a file. Raises DataError if it has none."""
    # Without an output ffmpeg prints what it found and ends with an error.
    text = _run(_file(source), config)[1]
    if "Format not on whitelist" in text:
        raise DataError("not a video: a playlist, a picture or the like")
    if "Input #0" not in text:
        raise DataError(f"not a video: {_reason(text)}")
    # "  Stream #0:0[0x1](und): Video: h264 (High) (avc1 / 0x31637661), yuv420p(tv), 320x240 [SAR 1:1], 25 fps, 25 tbr"
    # From the line's begin: a title may say the same.
    stream = r"^ *Stream #.*?: Video: (\w+).*?, (\w+)(?:\([^)]*\))?, (\d+)x(\d+)(.*)"
    streams = re.findall(stream, text, re.MULTILINE)
    streams = [s for s in streams if "(attached pic)" not in s[-1]]  # the cover of a sound file
    if not streams:
        raise DataError("no video stream in it" + (", only sound" if ": Audio: " in text else ""))
    codec, pixels, width, height, rest = streams[0]
    fps = re.search(r"([\d.]+) fps", rest)
    time = re.search(r"^ *Duration: (\d+):(\d+):([\d.]+)", text, re.MULTILINE)
    duration_s = 3600 * int(time[1]) + 60 * int(time[2]) + float(time[3]) if time else None
    rate = float(fps[1]) if fps else None
    is_square = all(w == h for w, h in re.findall(r"SAR (\d+):(\d+)", rest))  # the stream's and the container's
    return Probe(codec, pixels, int(width), int(height), rate, duration_s, is_square and "rotation of" not in text)


@functools.cache
def ffmpeg_version() -> str:
    """The build's own name, "9.0.2-…": another build may write other bytes."""
    return _run(["-version"], VideoConfig())[2].split()[2]


def _examine(source: Path, config: VideoConfig, start: float | None, end: float | None) -> Probe:
    """The file's stream, if it is worth converting."""
    if source.stat().st_size == 0:
        raise DataError("the file is empty")
    stream = probe(source, config)
    if stream.width * stream.height > config.max_pixels:
        raise DataError(f"more than video.max_pixels={config.max_pixels} in a frame")
    length = end
    if stream.duration_s is not None:
        if (start or 0.0) >= stream.duration_s:
            raise DataError("it would begin after the end of the video")
        length = min(end or stream.duration_s, stream.duration_s)
    if length is not None and length - (start or 0.0) > config.max_duration_s:
        raise DataError(f"longer than video.max_duration_s={config.max_duration_s:g}")
    return stream


def _within(info: VideoInfo, config: VideoConfig) -> VideoInfo:
    """What a file's header need not tell."""
    if info.num_frames < config.min_frames:
        raise DataError(f"fewer than video.min_frames={config.min_frames} frames")
    if info.duration_s > config.max_duration_s:
        raise DataError(f"longer than video.max_duration_s={config.max_duration_s:g}")
    return info


def _is_small(stream: Probe, config: VideoConfig) -> bool:
    return (
        stream.codec == "h264"
        and stream.pixels == "yuv420p"
        and min(stream.width, stream.height) <= config.short_side
        and stream.fps is not None
        and stream.fps <= config.max_fps
        and stream.is_as_shown
    )


def _input(source: Path, config: VideoConfig, start: float | None = None, end: float | None = None) -> list[str]:
    span = []
    if start is not None:
        span += ["-ss", str(start)]
    if end is not None:
        span += ["-t", str(end - (start or 0.0))]
    # A stream may change its picture's size on the way.
    bounds = ["-threads", str(config.threads), "-max_pixels", str(config.max_pixels)]
    return [*bounds, *span, *_file(source), "-map", "0:V:0"]


def _file(source: Path) -> list[str]:
    """The protocol: a name with a colon in it is a file, and nothing is fetched from the network."""
    return ["-protocol_whitelist", "file", "-format_whitelist", CONTAINERS, "-i", f"file:{source}"]


def _copy(source: Path, target: Path, config: VideoConfig) -> VideoInfo | None:
    """The stream as it is, in an mp4, or None if it can't be copied or is not what its header promises."""
    with contextlib.suppress(DataError):  # some containers lack what mp4 needs
        _ffmpeg([*_input(source, config), "-c", "copy", *_output(target)], config)
        # It may hide a broken frame anywhere, and readers must be able to rely on every one.
        info = check_apart(target, every_frame=True, config=config)
        is_slow = round(info.fps, 2) <= config.max_fps  # ffmpeg rounds the rate it tells so, too
        if info.longest_gop <= config.gop and min(info.width, info.height) <= config.short_side and is_slow:
            return info
    return None


def _encode(
    source: Path,
    target: Path,
    config: VideoConfig,
    stream: Probe,
    start: float | None,
    end: float | None,
    encoder: list[str],
) -> None:
    threads = str(config.threads)
    fps = min(config.max_fps, stream.fps or config.max_fps)
    # Square pixels, even sides, never larger than the source.
    width, height = (f"trunc(min({side},{config.short_side})/2)*2" for side in ("iw", "ih"))
    scale = f"scale=w='if(gt(dar,1),-2,{width})':h='if(gt(dar,1),{height},-2)':reset_sar=1"
    # bitexact: every CPU gives the same bytes. A constant rate: equal steps in frames are equal steps in time.
    picture = ["-vf", f"fps={fps:g},{scale}:flags=bicubic+accurate_rnd+bitexact", "-pix_fmt", "yuv420p"]
    # One frame more than may be, so that `_within` sees it, but not a gap in the time stamps filled for days.
    most = ["-frames:v", str(math.ceil(config.max_duration_s * fps) + 1)]
    codec = ["-c:v", "libx264", *encoder, "-threads", threads, "-filter_threads", threads]
    _ffmpeg([*_input(source, config, start, end), *picture, *most, *codec, *_output(target)], config)


def _closed_groups(config: VideoConfig) -> list[str]:
    """Groups of equal length, each decodable by itself."""
    gop = str(config.gop)
    groups = ["-g", gop, "-keyint_min", gop, "-sc_threshold", "0", "-flags:v", "+cgop+bitexact"]
    return ["-preset", config.preset, "-crf", str(config.crf), *groups]


def _output(target: Path) -> list[str]:
    clean = ["-an", "-sn", "-dn", "-map_metadata", "-1", "-map_chapters", "-1", "-fflags", "+bitexact"]
    return [*clean, "-movflags", "+faststart", "-f", "mp4", "-y", str(target)]


def _ffmpeg(arguments: list[str], config: VideoConfig) -> None:
    code, text, _ = _run(["-v", "error", *arguments], config)
    if code:
        raise DataError(f"cannot be converted: {_reason(text)}")


def _run(arguments: list[str], config: VideoConfig) -> tuple[int, str, str]:
    """ffmpeg's exit code, stderr and stdout; it and its children never outlive this call."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", *arguments]
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(command, **pipes, start_new_session=True) as process:
        try:
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                resource.prlimit(process.pid, resource.RLIMIT_CPU, (config.max_cpu_s, config.max_cpu_s + 5))
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (config.max_bytes, config.max_bytes))
            out, err = process.communicate(timeout=config.timeout_s)
        except subprocess.TimeoutExpired:
            # It may be the machine that is slow, so this says nothing about the clip.
            raise RunError(
                f"ffmpeg did not end within video.timeout_s={config.timeout_s:g}: raise it, or take the video out"
            ) from None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    text = err.decode(errors="replace")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    # ffmpeg ends with 255 on SIGTERM and SIGXCPU alike, and also on EPERM, which it prints.
    was_ended = process.returncode == 255 and "Operation not permitted" not in text
    if cpu_s > 0.95 * config.max_cpu_s and (was_ended or process.returncode == -signal.SIGKILL):
        raise DataError(f"takes more than video.max_cpu_s={config.max_cpu_s} CPU seconds")
    if process.returncode == -signal.SIGXFSZ or "File too large" in text:
        raise _too_large(config)
    # The node's fault, not the clip's: a rejected clip would be missing from the dataset for ever.
    if was_ended or process.returncode in (-signal.SIGKILL, -signal.SIGTERM):
        raise RunError("ffmpeg was killed, probably for want of memory: raise cpus_per_task and run again to go on")
    if "No space left on device" in text:
        raise RunError("ffmpeg found no space left on the node's disk: make room and run again to go on")
    return process.returncode, text, out.decode(errors="replace")


def _too_large(config: VideoConfig) -> DataError:
    return DataError(f"becomes larger than video.max_bytes={config.max_bytes}")


def _reason(text: str) -> str:
    """The first thing ffmpeg complained about."""
    lines = [re.sub(r"^\[.*?\] *", "", line).strip() for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("Input #", "Format ", "At least one output"))]
    return plain(lines[0]) if lines else "ffmpeg gives no reason"
