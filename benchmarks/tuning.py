"""What stopping early saves, what a study costs beside bare training, and that it survives lost nodes.

    python -m benchmarks.tuning asha dataset=URL | overhead | faults [key=value ...]

asha      The full grid of 27 points on the moving shapes, and its best point with other seeds. Then ASHA on these
          points in many random orders, asked as in a study, but about the curves that the grid has left: a point's
          curve is a function of its values. Told: the workers' time until the best seen is within the seeds' spread
          of the grid's best, and until that best itself, as a share of the grid's, and the same of the orders without
          stopping. By mean rank on val, which is smoother than R@1 in short runs; the time is that of the training
          loops, without start-up.
overhead  Seconds per trial of a study of three, one at a time, less those of one bare training.train, in paired rounds.
faults    50 short trials on three Ray nodes of one CPU each; `kills` nodes are killed, one in each call, each call with
          three nodes again.

All of it is studies, so the same command goes on where it stopped; it stops when `minutes` are over.
"""

import dataclasses
import heapq
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median
from typing import Any

import ray
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from benchmarks import rounds
from cluster.local import start_ray
from common import config as configs
from common import logs, storage
from common.config import Settings
from common.errors import ConfigError, exit_with
from training.config import PRESETS, TrainConfig
from training.train import connect, train
from tuning.config import Domain, StudyConfig
from tuning.records import Record, Records
from tuning.space import resolve, trial_config
from tuning.stopping import is_behind
from tuning.study import run

METRIC = "mnr"
REPOSITORY = Path(__file__).parents[1]


class TuningBenchConfig(Settings):
    """What is measured, and how much of it."""

    folder: str = Field("data/bench-tuning", description="local folder of datasets, studies and results")
    minutes: PositiveFloat = Field(5.0, description="a call ends then; run again to go on")
    dataset: str | None = Field(None, description="dataset of asha, as benchmarks.learning takes it")
    base: str = Field("moving_shapes", description="training preset of asha")
    backbone: str = Field("benchmarks/learning.json", description="of asha's models")
    steps: PositiveInt = Field(90, description="of a trial of asha: nine evaluations")
    batch_size: PositiveInt = Field(32, description="of a trial of asha")
    values: list[int] = Field([2, 3, 6], description="of model.num_prompts; three, for 27 points", min_length=1)
    rates: list[float] = Field([3e-4, 1e-3, 3e-3], description="of optim.lr", min_length=1)
    captions: list[float] = Field([0.1, 0.5, 1.0], description="of losses.caption", min_length=1)
    orders: PositiveInt = Field(100, description="random orders of the points for asha")
    seeds: int = Field(3, ge=2, description="other seeds of the grid's best point")
    rounds: PositiveInt = Field(5, description="paired rounds of overhead")
    trials: PositiveInt = Field(50, description="of faults")
    kills: NonNegativeInt = Field(2, description="nodes killed, one in a call")


def asha(config: TuningBenchConfig) -> None:
    if config.dataset is None:
        raise ConfigError("no dataset given: asha dataset=URL (built by datasets_prep.build)")
    if not ray.is_initialized():
        connect()
    folder, end = Path(config.folder).absolute(), time.monotonic() + 60 * config.minutes
    space = {
        "optim.lr": [Domain(choice=config.rates)],
        "model.num_prompts": [Domain(choice=config.values)],
        "losses.caption": [Domain(choice=config.captions)],
    }
    overrides = {
        **_place(folder, storage.absolute(config.dataset)),
        "model.backbone": config.backbone,
        "optim.steps": config.steps,
        "optim.batch_size": config.batch_size,
        "eval.every": max(1, config.steps // 9),
    }
    by: dict[str, Any] = {"base": config.base, "metric": METRIC, "mode": "min"}
    grid = _study(folder, end, name="grid", searcher="grid", space=space, overrides=overrides, **by)
    if grid is None:
        return
    top = min(grid, key=best_of)
    seeds, same = [Domain(choice=list(range(1, config.seeds + 1)))], {**overrides, **top.values}
    again = _study(folder, end, name="seeds", searcher="grid", space={"seed": seeds}, overrides=same, **by)
    if again is None:
        return
    ends = [best_of(record) for record in (top, *again)]
    print(f"grid's best {METRIC} {ends[0]:.3f}; that point with {len(ends)} seeds: {min(ends):.3f} to {max(ends):.3f}")
    study = _config(folder, name="asha", trials=len(grid), scheduler="asha", space=space, overrides=overrides, **by)
    base, targets = resolve(study), (ends[0] + max(ends) - min(ends), ends[0])
    for stops in (True, False):
        orders = [replayed(study, base, grid, order, stops) for order in range(config.orders)]
        for target in targets:
            print("\n".join(told("asha" if stops else "no stopping", grid, orders, target)))


def replayed(study: StudyConfig, base: TrainConfig, grid: list[Record], order: int, stops: bool) -> list[Record]:
    """The grid's trials as they would have gone in a random order, two at once, with what is behind stopped or not.

    A point's curve is a function of its values, so what ASHA would have seen of it is known; who is behind is asked as
    in a study.
    """
    finished = [record for record in grid if record.status == "finished"]
    waiting = random.Random(order).sample(finished, len(finished))
    begun, live = list[Record](), list[tuple[float, int]]()
    whole = {record.number: record.reports for record in grid}

    def start(now: float) -> None:
        if waiting:
            begun.append(dataclasses.replace(waiting.pop(), status="running", reports=[]))
            number = begun[-1].number
            heapq.heappush(live, (now + whole[number][0]["worker_s"], number))

    for _ in range(2):
        start(0.0)
    while live:
        now, number = heapq.heappop(live)
        record = next(one for one in begun if one.number == number)
        done, reports = len(record.reports), whole[number]
        record.reports.append({**reports[done], "time": now})
        if stops and is_behind(study, trial_config(study, base, record.values), record, begun):
            record.status = "stopped"
        elif done + 1 == len(reports):
            record.status = "finished"
        else:
            heapq.heappush(live, (now + reports[done + 1]["worker_s"] - reports[done]["worker_s"], number))
            continue
        start(now)
    return begun


def told(name: str, grid: list[Record], orders: list[list[Record]], target: float) -> list[str]:
    """What the trials of each order took, in all and until the first reported `target` or less, beside the grid's."""
    lines = []
    for unit, key in (("worker seconds", "worker_s"), ("steps", "step")):
        whole = spent(grid, key)
        shares = [reached / whole for one in orders if (reached := until(one, target, key)) is not None]
        there = f"{median(shares):.3f} [{min(shares):.3f}, {max(shares):.3f}]" if shares else "none"
        in_all = median(spent(one, key) / whole for one in orders)
        lines.append(
            f"{name}, shares of the grid's {whole:.0f} {unit}: {in_all:.3f} in all; {there} until {target:.3f}, "
            f"in {len(shares)} of {len(orders)} orders"
        )
    return lines


def best_of(record: Record) -> float:
    return min((report[METRIC] for report in record.reports), default=float("inf"))


def spent(records: Iterable[Record], key: str) -> float:
    """Of all trials, up to each one's last report, in the unit of `key`."""
    return sum(record.reports[-1][key] for record in records if record.reports)


def until(records: Iterable[Record], target: float, key: str) -> float | None:
    """The same, of all trials together, when the first of them reported `target` or less; None if none did."""
    reports = sorted(((report["time"], r.number, report) for r in records for report in r.reports), key=lambda x: x[:2])
    latest: dict[int, float] = {}
    for _, number, report in reports:
        latest[number] = report[key]
        if report[METRIC] <= target:
            return sum(latest.values())
    return None


def overhead(config: TuningBenchConfig) -> None:
    folder, dataset = _tiny(config)
    if not ray.is_initialized():
        connect()
    output, per_study = folder / "overhead", 3
    overrides = {**_place(folder, dataset), "optim.steps": 20, "eval.every": 10, "checkpoint.every": 10}

    def bare() -> None:
        place = {"run.name": "bare", "run.storage": str(output), "tracking.uri": _uri(folder)}
        train(configs.apply(configs.load(TrainConfig, "tiny", [], PRESETS), {**overrides, **place}))

    def studied() -> None:
        space = {"optim.lr": [Domain(choice=[1e-3, 2e-3, 3e-3])]}
        by: dict[str, Any] = {"base": "tiny", "searcher": "grid", "max_concurrent": 1, "storage": str(output)}
        _study(folder, time.monotonic() + 600, name="study", space=space, overrides=overrides, **by)

    def per_trial() -> rounds.Times:
        return {"tasks": rounds.seconds(studied)["tasks"] / per_study}

    bare()  # what only the first one pays for: imports, MLflow's database
    sides: dict[str, Callable[[], rounds.Times]] = {"bare": lambda: rounds.seconds(bare), "study": per_trial}
    rows = rounds.run(folder / "overhead.jsonl", {}, config.rounds, config.minutes, sides, output)
    if rows:
        for side in sides:
            print(f"{side}: {rounds.spread([row[side]['tasks'] for row in rows])} s a trial")
        print(
            f"study - bare: {rounds.spread([row['study']['tasks'] - row['bare']['tasks'] for row in rows])} s a trial"
        )


def faults(config: TuningBenchConfig) -> None:
    folder, dataset = _tiny(config)
    counter = folder / "killed"
    killed = int(counter.read_text()) if counter.exists() else 0
    is_due = killed < config.kills
    space = '{"optim.lr_new": {"loguniform": [1e-5, 1e-1]}, "losses.caption": {"uniform": [0.1, 1.0]}}'
    places = {f"overrides.{key}": value for key, value in _place(folder, dataset).items()}
    values = {"name": "faults", "storage": folder, "tracking.uri": _uri(folder), **places, "trials": config.trials}
    arguments = [f"{key}={value}" for key, value in values.items()]
    arguments += [f"space={space}", f"time_budget_s={60 * config.minutes}", "overrides.workers.start_timeout_s=60"]
    command = [sys.executable, "-m", "tuning.study", "tiny", *arguments]
    cluster = start_ray(folder / "ray", num_nodes=3, cpus_per_node=1)
    driver = subprocess.Popen(command, env={**os.environ, **cluster.env}, cwd=REPOSITORY)
    try:
        began = len(_ended(folder))
        while driver.poll() is None:
            time.sleep(1)
            if is_due and len(_ended(folder)) >= began + 3:
                cluster.kill_node(1)
                is_due, killed = False, killed + 1
                counter.write_text(str(killed))
                print("a node was killed", flush=True)
    finally:
        driver.kill()
        cluster.stop()
    records = list(Records(str(folder / "faults")))
    for status in ("finished", "stopped", "failed", "running"):
        print(f"{status}: {sum(record.status == status for record in records)}")
    print(f"nodes killed: {killed}; starts that failed: {sum(record.failures for record in records)}")


def _ended(folder: Path) -> list[Record]:
    return [record for record in Records(str(folder / "faults")) if record.status != "running"]


def _config(folder: Path, **values: Any) -> StudyConfig:
    return StudyConfig(**{"storage": str(folder), "tracking": {"uri": _uri(folder)}, **values})


def _study(folder: Path, end: float, **values: Any) -> list[Record] | None:
    """The trials of a study that is over; None if the time was over before."""
    study = _config(folder, time_budget_s=max(1.0, end - time.monotonic()), **values)
    result = run(study)
    if not result["is_over"]:
        print(f"study {study.name} is not over: run it again to go on")
        return None
    return list(Records(storage.join(study.storage, study.name)))


def _tiny(config: TuningBenchConfig) -> tuple[Path, str]:
    """The folder, and the tiny dataset in it, built if it is not there."""
    folder = Path(config.folder).absolute()
    dataset = folder / "tiny"
    if not (dataset / "dataset.json").exists():
        command = [sys.executable, "-m", "datasets_prep.build", "tiny", f"output={dataset}"]
        subprocess.run([*command, f"source.videos={folder}/videos"], cwd=REPOSITORY, check=True)
    return folder, str(dataset)


def _place(folder: Path, dataset: str) -> dict[str, Any]:
    one = {"workers.num_workers": 1, "workers.loader_workers": 0, "workers.cpus_per_worker": 1}
    return {"data.dataset": dataset, "data.cache": str(folder / "cache"), **one}


def _uri(folder: Path) -> str:
    return f"sqlite:///{folder / 'mlflow.db'}"


MODES = {"asha": asha, "overhead": overhead, "faults": faults}


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or "--help" in arguments or "-h" in arguments:
        print(f"{(__doc__ or '').strip()}\n\n{configs.describe(TuningBenchConfig)}")
        return 0
    if arguments[0] not in MODES:
        raise ConfigError(f"{arguments[0]!r} is no mode: give one of {', '.join(MODES)}")
    logs.setup()
    MODES[arguments[0]](configs.validate(TuningBenchConfig, configs.parse_overrides(arguments[1:])))
    return 0


if __name__ == "__main__":
    exit_with(main)
