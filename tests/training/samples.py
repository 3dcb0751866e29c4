"""What a run was trained on, step by step, from its log of video ids; and how tests end its workers."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from common import shards
from training.config import TrainConfig
from training.data.loader import sample_order, train_entries

Steps = dict[int, set[str]]  # step → video ids of the global batch


class Start(NamedTuple):
    """One start of the workers: what each step read, the union of all ranks."""

    pids: set[int]
    steps: Steps
    captions: dict[int, set[str]]


def starts(folder: Path) -> list[Start]:
    """In the order of time. The logs of one start begin after the last line of the start before."""
    files = sorted(folder.glob("*.jsonl"), key=lambda f: int(f.name.partition("-")[0]))
    found: list[Start] = []
    ranks: set[int] = set()
    written = 0  # when the start was last seen to go on
    for file in files:
        begun, pid, rank = file.stem.split("-")
        # A start of more ranks than the one before may log a new rank first.
        if not found or int(rank) in ranks or 0 < written < int(begun):
            found.append(Start(set(), {}, {}))
            ranks, written = set(), 0
        ranks.add(int(rank))
        if file.stat().st_size:
            written = max(written, file.stat().st_mtime_ns)
        found[-1].pids.add(int(pid))
        for line in file.read_text().splitlines():
            record = json.loads(line)
            videos = found[-1].steps.setdefault(record["step"], set())
            assert not videos & set(record["videos"]), "a video twice in a global batch"
            videos |= set(record["videos"])
            found[-1].captions.setdefault(record["step"], set()).update(record["captions"])
    return found


def planned(config: TrainConfig) -> Steps:
    """The global batches as the sample order alone gives them."""
    dataset, _ = shards.read_dataset(config.data.dataset)
    order = sample_order(config, dataset)
    markers = [shards.read_marker(config.data.dataset, entry.name) for entry in train_entries(config, dataset)]
    return {
        step: {markers[shard].samples[row].video_id for _, shard, row in order.batch(step, 0, 1)}
        for step in range(config.optim.steps)
    }


def effective(folder: Path) -> Steps:
    """Of each step, what the last start that did it read: the others' updates went with their checkpoint."""
    steps: Steps = {}
    for start in starts(folder):
        steps.update(start.steps)
    return steps


def reached(folder: Path) -> int:
    """The last step begun by any rank."""
    return max((step for start in starts(folder) for step in start.steps), default=-1)


def when(condition: Callable[[], bool], act: Callable[[], object], timeout_s: float = 300) -> threading.Thread:
    """Do it, in a thread, as soon as the condition holds."""

    def watch() -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                return
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def kill_a_worker(folder: Path) -> None:
    os.kill(max(starts(folder)[-1].pids), signal.SIGKILL)
