"""How fast data preparation is: beside video2dataset, plain ffmpeg and boto3, and on more cores.

    python -m benchmarks.prep peer peer=PYTHON [key=value ...]
    python -m benchmarks.prep scaling | upload [key=value ...]

peer     Rounds in alternating order on the same videos and cores: datasets_prep.build, video2dataset (PYTHON is the
         interpreter of an environment with it), and as the limit one plain ffmpeg per video with the build's settings.
         Each cuts, scales and slows every video to H.264. video2dataset encodes three times (cut, scale, rate) and has
         no options for it; peer_encoder=same puts the build's preset, crf, gop and threads into each of its ffmpeg
         calls, peer_encoder=own leaves x264's defaults (preset medium, gop 250). All sides run imageio-ffmpeg's ffmpeg;
         since version 7 it no longer cuts at a key frame that lies exactly at one of `-segment_times`, as video2dataset
         needs, so its calls get `-segment_time_delta 0.02`, which ffmpeg's manual advises.
scaling  The build and plain ffmpeg, one at a time against two at a time, on the same two cores.
upload   storage.publish against boto3's upload_file of the same bytes to a local S3 server.

Rounds are kept in folder/MODE.jsonl: the same command goes on where it stopped, and stops when `minutes` are over.
"""

import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import imageio_ffmpeg
from pydantic import Field, PositiveFloat, PositiveInt

from benchmarks import rounds
from benchmarks.rounds import Times
from common import config as configs
from common import storage
from common.config import Settings
from common.errors import ConfigError, RunError, exit_with
from datasets_prep.check import check
from datasets_prep.config import PRESETS, BuildConfig, VideoConfig
from datasets_prep.shard_writer import members_of

REPOSITORY = Path(__file__).parents[1]
FFMPEG = imageio_ffmpeg.get_ffmpeg_exe()


class PrepBenchConfig(Settings):
    """What is measured, and how much of it."""

    folder: str = Field("data/bench-prep", description="local folder of test videos, results and temporary files")
    rounds: PositiveInt = Field(7, description="paired rounds")
    minutes: PositiveFloat = Field(7.0, description="no round begins that would end later; run again to go on")
    clips: PositiveInt = Field(8, description="test videos")
    seconds: PositiveFloat = Field(10.0, ge=3, description="length of each; all but the first and last second is kept")
    size: str = Field("1280x720", description="of the test videos, which are wide")
    rate: PositiveInt = Field(30, description="frames per second of the test videos")
    short_side: PositiveInt = Field(256, description="of the result")
    fps: PositiveFloat = Field(15.0, description="of the result")
    cores: PositiveInt = Field(1, description="CPUs that each side may use, and its tasks at once; scaling takes 2")
    peer: str | None = Field(None, description="interpreter of an environment with video2dataset; null = leave it out")
    peer_encoder: Literal["same", "own"] = Field(
        "same", description="same = the build's encoder settings; own = its own"
    )
    peer_precision: Literal["exact", "low"] = Field("exact", description="how video2dataset cuts; low = at key frames")
    upload_mb: PositiveInt = Field(256, description="size of the uploaded file")


def ours(config: PrepBenchConfig, folder: Path, cores: int, workers: int) -> Times:
    """datasets_prep.build in a process of its own on `cores` CPUs: from its first task to its end, and the whole."""
    arguments = [sys.executable, "-m", "benchmarks.prep", "_build", str(workers), f"folder={folder}"]
    arguments += [f"{k}={json.dumps(getattr(config, k))}" for k in ("clips", "seconds", "short_side", "fps")]
    text, whole_s = _timed(arguments, cores, {})
    _check(next((folder / "out").rglob("*.tar")), config)
    return {"tasks": float(text.strip().splitlines()[-1]), "whole": whole_s}


def build_here(config: PrepBenchConfig, workers: int) -> float:
    """Seconds from the first task of a build to its end, with a worker that is ready, as video2dataset counts them."""
    import ray

    from datasets_prep import build as build_module

    # A worker node of a cluster has no dashboard of its own.
    ray.init(num_cpus=workers, include_dashboard=False, logging_level=logging.WARNING)
    ready = ray.remote(num_cpus=1)(_imported)
    ray.get([ready.remote() for _ in range(workers)])
    began: list[float] = []
    run = build_module._run

    def noted(*arguments: Any) -> Iterator[Any]:
        began.append(time.monotonic())
        return run(*arguments)

    build_module._run = noted  # type: ignore[assignment]
    folder = Path(config.folder)
    values = [f"source.annotations={folder / 'clips.jsonl'}", f"source.videos={folder / 'videos'}"]
    values += [f"output={folder / 'out'}", f"workers={workers}", f"shards.max_samples={_per_shard(config)}"]
    values += [f"video.short_side={config.short_side}", f"video.max_fps={config.fps}", "payload=video"]
    build_module.build(configs.load(BuildConfig, "custom", values, PRESETS))
    return time.monotonic() - began[0]


def _imported() -> None:
    time.sleep(0.5)  # so that every worker gets one
    import datasets_prep.shard_writer  # noqa: F401


def video2dataset(config: PrepBenchConfig, folder: Path, cores: int) -> Times:
    """The peer: from the first shard's begin to the last one's end by its own statistics, and the whole."""
    assert config.peer
    out = folder / "out"
    arguments = [config.peer, str(REPOSITORY / "benchmarks/prep_video2dataset.py"), str(folder / "clips.parquet")]
    arguments += [str(out), str(cores), str(config.short_side), str(config.fps), str(_per_shard(config))]
    path = f"{_shim(config, folder)}:{os.environ['PATH']}"
    _, whole_s = _timed([*arguments, config.peer_precision], cores, {"PATH": path})
    statistics = [json.loads(file.read_text()) for file in out.glob("*_stats.json")]
    successes = sum(s["successes"] for s in statistics)
    if successes != config.clips:
        raise RunError(f"video2dataset made {successes} of {config.clips} clips: see its output with LOG=1")
    _check(next(out.glob("*.tar")), config)
    return {
        "tasks": max(s["end_time"] for s in statistics) - min(s["start_time"] for s in statistics),
        "whole": whole_s,
    }


def plain_ffmpeg(config: PrepBenchConfig, folder: Path, cores: int, at_once: int) -> Times:
    """The limit: one ffmpeg per video, `at_once` of them, with the build's settings and nothing around them."""
    like: VideoConfig = BuildConfig.model_fields["video"].default
    threads, gop = str(like.threads), str(like.gop)
    span = ["-ss", "1", "-t", f"{config.seconds - 2:g}"]
    scale = f"scale=-2:{config.short_side}:flags=bicubic+accurate_rnd+bitexact"
    picture = ["-vf", f"fps={config.fps:g},{scale}", "-pix_fmt", "yuv420p", "-filter_threads", threads]
    encoder = ["-c:v", "libx264", "-preset", like.preset, "-crf", str(like.crf), "-threads", threads]
    groups = ["-g", gop, "-keyint_min", gop, "-sc_threshold", "0", "-flags:v", "+cgop+bitexact"]
    end = ["-an", "-movflags", "+faststart", "-y"]
    out = folder / "out"
    out.mkdir()

    def convert(source: Path) -> None:
        before = [FFMPEG, "-v", "error", "-nostdin", "-threads", threads, *span, "-i", str(source)]
        _timed([*before, *picture, *encoder, *groups, *end, str(out / source.name)], cores, {})

    start = time.monotonic()
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(convert, sorted((folder / "videos").iterdir())))
    seconds = time.monotonic() - start
    return {"tasks": seconds, "whole": seconds}


def _shim(config: PrepBenchConfig, folder: Path) -> Path:
    """A folder with a program `ffmpeg`, for video2dataset finds it on PATH."""
    program = folder / "bin" / "ffmpeg"
    program.parent.mkdir(exist_ok=True)
    like: VideoConfig = BuildConfig.model_fields["video"].default
    options = f"-preset {like.preset} -crf {like.crf} -g {like.gop} -keyint_min {like.gop} -sc_threshold 0 -threads 1"
    before, after = ("-threads 1", options) if config.peer_encoder == "same" else ("", "")
    lines = [
        "#!/bin/bash",
        f'[ $# -gt 4 ] || exec "{FFMPEG}" "$@"  # asked for its version',
        'case " $* " in *" -segment_times "*) cut="-segment_time_delta 0.02" ;; esac',
        f'exec "{FFMPEG}" {before} "${{@:1:$#-1}}" $cut {after} "${{@: -1}}"',
    ]
    program.write_text("\n".join(lines) + "\n")
    program.chmod(0o755)
    return program.parent


def _timed(arguments: list[str], cores: int, env: dict[str, str]) -> tuple[str, float]:
    """Run a program on the first `cores` CPUs of this process; its output and the seconds it took."""
    cpus = sorted(os.sched_getaffinity(0))[:cores]
    start = time.monotonic()
    done = subprocess.run(
        arguments,
        cwd=REPOSITORY,
        env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0", **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=None if os.environ.get("LOG") else subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cpus),
    )
    if done.returncode:
        raise RunError(f"{' '.join(arguments[:3])} … ended with {done.returncode}: run again with LOG=1 to see why")
    return done.stdout, time.monotonic() - start


def _check(tar: Path, config: PrepBenchConfig) -> None:
    """The work was done: the first video of a tar has the length, rate and size that were asked for."""
    members = next(iter(members_of(tar).values()))
    with tempfile.TemporaryDirectory() as folder, open(tar, "rb") as file:
        file.seek(members["mp4"][0])
        clip = Path(folder) / "clip.mp4"
        clip.write_bytes(file.read(members["mp4"][1]))
        made = check(clip, every_frame=False)
    wanted = (config.seconds - 2) * config.fps
    is_long = config.peer_precision == "low"  # it cuts at the key frames around
    if made.height != config.short_side or not (abs(made.num_frames - wanted) <= 2 or is_long):
        raise RunError(
            f"{tar.name}: {made.num_frames} frames of height {made.height}, not {wanted:g} of {config.short_side}: the "
            "sides do not do the same work"
        )


def _per_shard(config: PrepBenchConfig) -> int:
    """Four shards: two tasks for each of two workers."""
    return max(1, config.clips // 4)


def peer(config: PrepBenchConfig) -> None:
    folder, cores = inputs(config), config.cores
    sides: dict[str, Callable[[], Times]] = {
        "ours": lambda: ours(config, folder, cores, cores),
        "ffmpeg": lambda: plain_ffmpeg(config, folder, cores, cores),
    }
    if config.peer:
        sides["video2dataset"] = lambda: video2dataset(config, folder, cores)
    rows = _paired(config, "peer", sides, folder / "out")
    for span in ("tasks", "whole"):
        for side in sides:
            rates = [config.clips / row[side][span] / cores for row in rows]
            print(f"{side:<14} {span:<6} {rounds.spread(rates)} clips/s per core")
    others = [side for side in ("video2dataset", "ffmpeg") if side in sides]
    for other, span in ((other, span) for other in others for span in ("tasks", "whole")):
        # Where plain ffmpeg has no start, its own time stands for both.
        print(f"ours / {other}, {span}: {rounds.spread([row[other][span] / row['ours'][span] for row in rows])}")


def scaling(config: PrepBenchConfig) -> None:
    folder = inputs(config)
    sides: dict[str, Callable[[], Times]] = {
        "ours 1": lambda: ours(config, folder, 2, 1),
        "ours 2": lambda: ours(config, folder, 2, 2),
        "ffmpeg 1": lambda: plain_ffmpeg(config, folder, 2, 1),
        "ffmpeg 2": lambda: plain_ffmpeg(config, folder, 2, 2),
    }
    rows = _paired(config, "scaling", sides, folder / "out")
    for side in ("ours", "ffmpeg"):
        for workers in (1, 2):
            rates = [config.clips / row[f"{side} {workers}"]["tasks"] for row in rows]
            print(f"{side} {workers}: {rounds.spread(rates)} clips/s")
        print(f"{side} 2 / 1: {rounds.spread([row[f'{side} 1']['tasks'] / row[f'{side} 2']['tasks'] for row in rows])}")
    for n in (1, 2):
        ratios = [row[f"ffmpeg {n}"]["tasks"] / row[f"ours {n}"]["tasks"] for row in rows]
        print(f"ours {n} / ffmpeg {n}: {rounds.spread(ratios)}")


def upload(config: PrepBenchConfig) -> None:
    import boto3

    from cluster.local import start_s3

    folder = Path(config.folder).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        path = Path(temporary) / "content"
        with open(path, "wb") as file:
            for _ in range(config.upload_mb):
                file.write(os.urandom(1 << 20))
        server = start_s3(Path(temporary), ["bench"])
        try:
            os.environ.update(server.env)
            client = boto3.client("s3")

            def by_boto3() -> None:
                client.upload_file(str(path), "bench", "content")

            def by_ours() -> None:
                storage.publish(path, "s3://bench/content")

            by_boto3()  # each client once before it counts
            by_ours()
            sides = {"ours": lambda: rounds.seconds(by_ours), "boto3": lambda: rounds.seconds(by_boto3)}
            rows = _paired(config, "upload", sides, folder / "out")
        finally:
            server.stop()
    for side in sides:
        print(f"{side}: {rounds.spread([config.upload_mb / row[side]['tasks'] for row in rows])} MiB/s")
    print(f"ours / boto3: {rounds.spread([row['boto3']['tasks'] / row['ours']['tasks'] for row in rows])}")


MODES: dict[str, Callable[[PrepBenchConfig], None]] = {
    "peer": peer,
    "scaling": scaling,
    "upload": upload,
}


def inputs(config: PrepBenchConfig) -> Path:
    """The test videos and both sides' lists of them; made once per size. Three kinds of picture, one long GOP each."""
    name = f"{config.clips}x{config.seconds:g}s-{config.size}-{config.rate}"
    folder = Path(config.folder).absolute() / name
    if (folder / "clips.parquet").exists():
        return folder
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    kinds = [
        f"mandelbrot=size={config.size}:rate={config.rate}",
        f"testsrc2=size={config.size}:rate={config.rate},noise=alls=12:allf=t",
        f"life=size={config.size}:rate={config.rate}:mold=10:ratio=0.1:death_color=#C83232:life_color=#00ff00",
    ]
    names = [f"{i:03d}.mp4" for i in range(config.clips)]
    for i, file in enumerate(names):
        # The same kind again begins elsewhere.
        picture = ["-f", "lavfi", "-i", kinds[i % 3], "-ss", str(i // 3), "-t", str(config.seconds)]
        encoding = ["-c:v", "libx264", "-preset", "veryfast", "-g", "250", "-pix_fmt", "yuv420p"]
        command = [FFMPEG, "-v", "error", "-y", *picture, *encoding]
        subprocess.run([*command, str(folder / "videos" / file)], check=True, stdin=subprocess.DEVNULL)
    end = config.seconds - 1
    lines = [{"video": f, "caption": f"video {f}", "start": 1.0, "end": end, "split": "train"} for f in names]
    (folder / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    import pyarrow as pa
    import pyarrow.parquet

    columns = {
        "path": [str(folder / "videos" / f) for f in names],
        "caption": names,
        "clips": [[[1.0, end]]] * len(names),
    }
    pyarrow.parquet.write_table(pa.table(columns), folder / "clips.parquet")
    return folder


def _paired(config: PrepBenchConfig, mode: str, sides: dict[str, rounds.Side], output: Path) -> list[dict[str, Times]]:
    key = config.model_dump(exclude={"folder", "rounds", "minutes"})
    file = Path(config.folder).absolute() / f"{mode}.jsonl"
    return rounds.run(file, key, config.rounds, config.minutes, sides, output)


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(f"{(__doc__ or '').strip()}\n\n{configs.describe(PrepBenchConfig)}")
        return 0
    if arguments[0] == "_build":  # what `ours` starts
        config = configs.validate(PrepBenchConfig, configs.parse_overrides(arguments[2:]))
        with contextlib.redirect_stdout(sys.stderr):
            seconds = build_here(config, int(arguments[1]))
        print(seconds)
        return 0
    if arguments[0] not in MODES:
        raise ConfigError(f"{arguments[0]!r} is no mode: give one of {', '.join(MODES)}")
    MODES[arguments[0]](configs.validate(PrepBenchConfig, configs.parse_overrides(arguments[1:])))
    return 0


if __name__ == "__main__":
    exit_with(main)
