"""Decode a finished mp4 as training will. `python -m datasets_prep.check` is what `check_apart` starts."""

import functools
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

from common.errors import DataError, RunError
from datasets_prep.config import VideoConfig


class VideoInfo(NamedTuple):
    """What is in a finished mp4."""

    duration_s: float
    fps: float
    num_frames: int
    width: int
    height: int
    longest_gop: int


def plain(reason: str) -> str:
    """A decoder's complaint without the numbers of this one file, so that equal reasons are equal texts."""
    return re.sub(r"\b(0x[0-9a-f]+|\d+)\b", "N", reason)


def check(file: Path | BinaryIO, every_frame: bool) -> VideoInfo:
    """Decode the first, middle and last frame, or all, with the library that training uses. Raises DataError."""
    import decord  # opens threads: imported in the process that decodes

    decord.logging.set_level(decord.logging.QUIET)  # what is wrong is raised, too
    try:
        reader = decord.VideoReader(str(file) if isinstance(file, Path) else file, num_threads=1)
        num_frames, fps, keys = len(reader), float(reader.get_avg_fps()), reader.get_key_indices()
        indices = list(range(num_frames)) if every_frame else sorted({0, num_frames // 2, num_frames - 1})
        # In batches, as training reads: decord can't fill one of pictures 16, 24, 48 or 72 pixels wide.
        for first in range(0, len(indices), 64):
            _, height, width, _ = reader.get_batch(indices[first : first + 64]).shape
    except Exception as error:  # decord raises several unrelated types
        text = str(error).strip() or type(error).__name__
        reason = re.sub(r"^(\[[\d:]+\] \S+ )+", "", text.splitlines()[0])  # "[13:05:59] file.cc:12: "
        reason = "decord can't open it" if reason.startswith("Error reading") else reason  # it names the path
        raise DataError(f"cannot be decoded: {plain(reason)}") from None
    gop = max(b - a for a, b in pairwise(sorted({0, *keys, num_frames})))
    return VideoInfo(round(num_frames / fps, 3), round(fps, 3), num_frames, width, height, gop)


def check_apart(file: Path, every_frame: bool, config: VideoConfig) -> VideoInfo:
    """`check` of someone else's stream, which may crash or hang the decoder, in a process of its own.

    Raises:
        DataError: it can't be decoded, or breaks `max_cpu_s`.
        RunError: the node is at fault, not the file.
    """
    process = _process()
    assert process.stdin and process.stdout
    try:
        process.stdin.write(json.dumps([str(file), every_frame, config.max_cpu_s]).encode() + b"\n")
        process.stdin.flush()
        is_ready, _, _ = select.select([process.stdout], [], [], config.timeout_s)
        answer = process.stdout.readline() if is_ready else b""
    except BrokenPipeError:
        is_ready, answer = [process.stdout], b""
    if answer:
        values = json.loads(answer)
        if isinstance(values, str):
            raise DataError(values)
        return VideoInfo(*values)
    _process.cache_clear()
    if not is_ready:
        process.kill()
    process.stdin.close()
    code = process.wait()
    process.stdout.close()
    if not is_ready:
        raise RunError(
            f"decord did not end within video.timeout_s={config.timeout_s:g}: raise it, or take the video out"
        )
    if code == -signal.SIGXCPU:
        raise DataError(f"takes more than video.max_cpu_s={config.max_cpu_s} CPU seconds")
    if code in (-signal.SIGSEGV, -signal.SIGABRT, -signal.SIGFPE, -signal.SIGBUS, -signal.SIGILL):
        raise DataError(f"cannot be decoded: decord ends with {signal.Signals(-code).name}")
    raise RunError(f"the process that checks videos ended with {code}: run again to go on")


@functools.cache
def _process() -> subprocess.Popen[bytes]:
    """One for this process's life, as it takes half a second to start; it ends with the pipe."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # Ray adds a job's folder there
    command = [sys.executable, "-m", "datasets_prep.check"]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)


def main() -> None:
    """Answer each line [file, every frame?, CPU seconds] with VideoInfo's values or a reason."""
    for line in sys.stdin:
        file, every_frame, max_cpu_s = json.loads(line)
        used = resource.getrusage(resource.RUSAGE_SELF)
        soft = int(used.ru_utime + used.ru_stime) + max_cpu_s
        resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))
        try:
            answer: VideoInfo | str = check(Path(file), every_frame)
        except DataError as error:
            answer = str(error)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
