"""The main job from end to end on this machine: `make demo`.

Starts an S3 server and a Ray cluster, makes captioned videos, shards them to S3, trains Prompt Switch by `ray job
submit`, evaluates, embeds, indexes and searches; prints a table and writes demo/result.json and
demo/contact_sheet.html. Every stage is a command of the README; its whole output is in demo/logs/.
"""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.local import start_ray, start_s3
from common import storage
from common.errors import RunError, exit_with
from common.logs import LINE_EVERY_S, duration
from training import metrics, tracking

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "demo"
QUERY = "a red square moves from left to right"
DATASET, RUNS, RUN_NAME = "s3://datasets/moving_shapes", "s3://runs", "demo"
RUN, VECTORS, INDEX = f"{RUNS}/{RUN_NAME}", "s3://runs/demo-vectors", "s3://runs/demo-index"
COUNTER = re.compile(r"step ([\d,]+)/([\d,]+)|\b([\d,]+) of ([\d,]+) \w+")
ORDER_BLIND = 0.5  # what averaging frames encoded one by one can reach: clip and twin get the same vector


def demo(folder: Path = FOLDER, build: Sequence[str] = (), train: Sequence[str] = ()) -> dict[str, Any]:
    """Run all stages; returns the content of result.json. Leaves nothing running, whatever happens.

    Args:
        folder: everything lands here; what was in it is deleted.
        build, train: more overrides for these stages.
    """
    if folder.exists():
        shutil.rmtree(folder)
    stages = Stages(folder / "logs")
    with contextlib.ExitStack() as stack:
        with stages.timed("start"):
            s3 = start_s3(folder / "s3", buckets=["datasets", "runs"])
            stack.callback(s3.stop)
            ray = start_ray(folder / "ray", cpus_per_node=max(2, os.cpu_count() or 2), env=s3.env)
            stack.callback(ray.stop)
        print(f"  S3 server {s3.url}, Ray dashboard {ray.dashboard_url} (token: {folder / 'ray' / 'ray_token'})")
        os.environ.update({**s3.env, **ray.env})
        pipeline(stages, folder, build, train)
        return report(stages.seconds, folder)


def pipeline(stages: "Stages", folder: Path, build: Sequence[str], train: Sequence[str]) -> None:
    """The commands, in order."""
    python = (sys.executable, "-m")
    cache = f"cache={folder / 'cache'}"
    stages.run(
        "build",
        *(*python, "datasets_prep.build", "moving_shapes", f"source.videos={folder / 'videos'}", f"output={DATASET}"),
        *build,
    )
    stages.run(
        "train",
        *(*python, "ray.scripts.scripts", "job", "submit", "--working-dir", str(ROOT), "--", "python", "-m"),
        *("training.train", "moving_shapes", f"run.name={RUN_NAME}", f"run.storage={RUNS}", f"data.dataset={DATASET}"),
        *(f"data.{cache}", f"tracking.uri=sqlite:///{ROOT / 'mlflow.db'}", *train),
    )
    stages.run(
        "embed",
        *(*python, "retrieval.embed", "default", f"run={RUN}", f"output={VECTORS}", "cpus_per_actor=1", cache),
    )
    stages.run("index", *python, "retrieval.index", "default", f"embeddings={VECTORS}", f"output={INDEX}")
    stages.run(
        "search",
        *(*python, "retrieval.search", QUERY, f"index={INDEX}", f"contact_sheet={folder / 'contact_sheet.html'}"),
    )


def report(stages_s: Mapping[str, float], folder: Path) -> dict[str, Any]:
    """Print the table and write result.json."""
    scores = json.loads(storage.read(storage.join(RUN, "result.json")))
    sheet = folder / "contact_sheet.html"
    result = {name: scores[name] for name in ("r1", "r5", "r10", "mdr", "mnr", "order")}
    result |= {
        "chance_r1": metrics.chance(int(scores["num_videos"])),
        "ceiling_order": ORDER_BLIND,
        "num_videos": int(scores["num_videos"]),
        "stages_s": {name: round(seconds, 1) for name, seconds in stages_s.items()},
        "mlflow_run": tracking.log_artifact(RUN, sheet),
        "dataset": DATASET,
        "run": RUN,
        "index": INDEX,
        "contact_sheet": str(sheet),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))
    print(f"all figures:   {folder / 'result.json'}")
    return result


def table(result: Mapping[str, Any]) -> str:
    """The result for a terminal."""
    videos = result["num_videos"]
    rows = [
        f"text → video on {videos} held-out videos",
        f"  {'':<22}{'R@1':>8}{'R@5':>8}{'R@10':>8}{'MdR':>8}{'MnR':>8}{'order':>8}",
        "  {:<22}{r1:>8.1f}{r5:>8.1f}{r10:>8.1f}{mdr:>8.1f}{mnr:>8.1f}{order:>8.3f}".format("Prompt Switch", **result),
        f"  {'chance':<22}{100 / videos:>8.1f}{500 / videos:>8.1f}{1000 / videos:>8.1f}"
        f"{(videos + 1) / 2:>8.1f}{(videos + 1) / 2:>8.1f}{0.5:>8.3f}",
        f"  {'order-blind ceiling':<22}{'':>40}{result['ceiling_order']:>8.3f}",
        "  order: which of a clip and its exact reversal does a caption mean? 1 = always right",
        "",
        "time: " + ", ".join(f"{name} {duration(seconds)}" for name, seconds in result["stages_s"].items())
        + f"; {duration(sum(result['stages_s'].values()))} in all",
        f"contact sheet: {result['contact_sheet']}",
        f"MLflow run:    {result['mlflow_run']} (after `make mlflow`)",
    ]  # fmt: skip
    return "\n".join(rows)


class Stages:
    """Runs commands one after the other, shows how far each is, and keeps time and logs."""

    def __init__(self, logs: Path) -> None:
        logs.mkdir(parents=True)
        self.logs = logs
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[None]:
        print(f"{name} ...", flush=True)
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start
        print(f"{name} done in {duration(self.seconds[name])}", flush=True)

    def run(self, name: str, *command: str) -> None:
        """Run a command; its output goes to a log, its progress to the terminal. Raises RunError if it fails."""
        path = self.logs / f"{name}.log"
        with self.timed(name), open(path, "w") as log, open(path) as output:
            child = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
            start = shown = time.monotonic()
            progress, printed, ended = "", "", False
            while not ended:
                ended = child.poll() is not None  # asked before reading: its last lines are read too
                latest = next((text for line in reversed(output.readlines()) if (text := counted(line))), "")
                progress = latest or progress
                now = time.monotonic()
                if sys.stdout.isatty():
                    show_bar(progress, now - start)
                elif now - shown > LINE_EVERY_S or (ended and progress != printed):
                    print(f"  {progress or name + ' runs'}, {duration(now - start)} so far", flush=True)
                    shown, printed = now, progress
                time.sleep(0 if ended else 0.2)
            if sys.stdout.isatty():
                print("\r\033[K", end="", flush=True)
            text = path.read_text().rstrip()
            if child.returncode != 0:
                last = text.splitlines()[-8:]
                reason = next((line for line in reversed(last) if "error: " in line), "\n".join(last))
                raise RunError(f"stage {name} failed ({path}): {reason}")
            if name == "search":
                print(text)


def counted(line: str) -> str:
    """What a progress line says without its prefix and colours; "" for any other line."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", line).strip().split(" INFO ", 1)[-1]
    return text if COUNTER.search(text) and " left" in text else ""


def show_bar(progress: str, seconds: float) -> None:
    """One line of a terminal, over the one before: a bar, as far as the work can be counted."""
    match = COUNTER.search(progress)
    done, total = (int(group.replace(",", "")) for group in match.groups() if group) if match else (0, 1)
    bar = "#" * round(24 * done / max(total, 1))
    text = f"  [{bar:<24}] {duration(seconds)} {progress}"
    print(f"\r{text[: shutil.get_terminal_size().columns - 1]}\033[K", end="", flush=True)


def main() -> int:
    demo()
    return 0


if __name__ == "__main__":
    exit_with(main)
