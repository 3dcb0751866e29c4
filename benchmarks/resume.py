"""What a failure costs: seconds until training goes on, and steps done twice, at several checkpoint intervals.

    python -m benchmarks.resume [key=value ...]

Trains the tiny preset on two workers of a Ray of its own, once for each interval, and ends a worker with kill -9 a few
times, spread over the interval. A step of the tiny model is short, so the seconds are those of starting again
(processes, imports, process group, checkpoint), which depend on the model by its checkpoint's size only.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import ray
from pydantic import Field, PositiveInt

from benchmarks import rounds
from common import config as configs
from common import logs
from common.config import Settings
from common.errors import exit_with
from training.config import PRESETS, TrainConfig
from training.train import connect, train


class ResumeBenchConfig(Settings):
    """What is measured, and how often."""

    folder: str = Field("data/bench-resume", description="local folder of the dataset")
    intervals: list[PositiveInt] = Field([2, 10, 50], description="values of checkpoint.every")
    kills: PositiveInt = Field(3, description="workers killed in each run")


class Kill(NamedTuple):
    """One worker's end; steps are counted from 0, as they begin."""

    at: int
    resumed_at: int
    to_next_s: float  # until any step begins again
    to_same_s: float  # until the step begins that was under way

    @property
    def wasted(self) -> int:
        return self.at - self.resumed_at


class Workers:
    """The ranks as their logs of samples show them: a file for each start and rank, a line for each step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest(self) -> Path | None:
        """The log of the newest start; the name begins with its time."""
        return max(self.folder.glob("*.jsonl"), key=lambda f: int(f.name.partition("-")[0]), default=None)

    def step(self) -> int:
        """The step that began last; -1 before the first of this start."""
        file = self.newest()
        whole = file.read_text().rpartition("\n")[0] if file else ""
        return int(json.loads(whole.rpartition("\n")[2])["step"]) if whole else -1

    def wait_for(self, step: int) -> None:
        while self.step() < step:
            time.sleep(0.01)

    def kill_one(self) -> Kill:
        file = self.newest()
        assert file is not None
        at = self.step()
        os.kill(int(file.stem.split("-")[1]), signal.SIGKILL)
        start = time.monotonic()
        while self.newest() == file:
            time.sleep(0.01)
        self.wait_for(0)
        to_next_s, resumed_at = time.monotonic() - start, self.first()
        self.wait_for(at)
        return Kill(at, resumed_at, to_next_s, time.monotonic() - start)

    def first(self) -> int:
        file = self.newest()
        assert file is not None
        return int(json.loads(file.read_text().partition("\n")[0])["step"])


def measure(config: ResumeBenchConfig, interval: int, dataset: Path) -> tuple[list[Kill], float]:
    """The kills of one run, and its steps per second between them."""
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "run.name": f"every-{interval}",
            "run.storage": f"{folder}/runs",
            "data.dataset": str(dataset),
            "data.cache": f"{folder}/cache",
            "tracking.uri": f"sqlite:///{folder}/mlflow.db",
            "tracking.samples": f"{folder}/samples",
            "tracking.log_every": 1000,
            "checkpoint.every": interval,
            "eval.every": 100_000,
            "optim.steps": 20 + (config.kills + 1) * 2 * interval,
            "workers.max_failures": -1,
        }
        workers, kills, rates = Workers(Path(folder) / "samples"), list[Kill](), list[float]()

        def disturb() -> None:
            for i in range(config.kills):
                workers.wait_for(0)
                first, start = workers.step(), time.monotonic()
                target = first + interval + round((i + 0.5) / config.kills * interval)
                workers.wait_for(target)
                rates.append((target - first) / (time.monotonic() - start))
                kills.append(workers.kill_one())

        thread = threading.Thread(target=disturb, daemon=True)
        thread.start()
        train(configs.apply(configs.load(TrainConfig, "tiny", [], PRESETS), values))
        thread.join(60)
        assert len(kills) == config.kills, kills
    return kills, median(rates)


def main() -> int:
    config = rounds.configured(ResumeBenchConfig)
    dataset = Path(config.folder).absolute() / "tiny"
    if not (dataset / "dataset.json").exists():
        shutil.rmtree(dataset, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "datasets_prep.build", "tiny", f"output={dataset}"], check=True)
    logs.setup()
    connect()
    print("every | steps/s | steps done twice | s to the next step | s to the step it was at")
    for interval in config.intervals:
        kills, rate = measure(config, interval, dataset)
        twice = " ".join(str(k.wasted) for k in kills)
        to_next, to_same = (" ".join(f"{s:.1f}" for s in found) for found in zip(*(k[2:] for k in kills), strict=True))
        print(f"{interval} | {rate:.1f} | {twice} | {to_next} | {to_same}", flush=True)
    ray.shutdown()
    return 0


if __name__ == "__main__":
    exit_with(main)
