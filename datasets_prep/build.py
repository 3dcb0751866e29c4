"""Build a dataset: annotations and videos → WebDataset shards, as Ray tasks, one per shard.

Starting the same build on the same output again goes on where it stopped. Ray: the cluster of RAY_ADDRESS, else a
local one. `python -m datasets_prep.verify OUTPUT` reads a finished dataset back.
"""

import heapq
import json
import logging
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import PIL
import ray
import ray.exceptions
import yaml

from common import config as configs
from common import logs, shards, storage
from common.errors import AlreadyExistsError, ConfigError, RunError, StorageError, exit_with, told
from common.shards import DatasetIndex, ShardEntry, SplitIndex
from datasets_prep import report, video
from datasets_prep.config import PRESETS, BuildConfig
from datasets_prep.plan import Clip, Cut, Plan, make_plan
from datasets_prep.shard_writer import MISSING, Outcome, Recipe, outcome, write_shard
from datasets_prep.sources import SOURCES

log = logging.getLogger(__name__)
ATTEMPTS = 5  # of one shard, when a node or the storage is at fault
FIRST_WAIT_S = 5.0  # before the second attempt, then twice as long each time: 75 s in all


class Built(NamedTuple):
    """A finished dataset, and how many clips are not in it for which reason."""

    dataset: DatasetIndex
    reasons: Counter[str]


class Done:
    """The finished shards by name, and their sums."""

    def __init__(self, outcomes: Iterable[Outcome] = ()) -> None:
        self.outcomes: dict[str, Outcome] = {}
        self.reasons: Counter[str] = Counter()
        self.samples = self.bytes = 0
        for one in outcomes:
            self.add(one)

    def add(self, one: Outcome) -> None:
        self.outcomes[one.entry.name] = one
        self.reasons.update(one.reasons)
        self.samples += one.entry.samples
        self.bytes += one.entry.bytes

    def __str__(self) -> str:
        return f"{self.samples:,} videos, {self.bytes / 1e6:,.1f} MB, {self.reasons.total():,} rejected"


def build(config: BuildConfig) -> Built:
    """Build, or go on building, the dataset at `config.output`. Starts Ray only when there is work for it.

    Raises:
        ConfigError, DataError, StorageError: as one sentence.
        RunError: another plan is at the output, or too many clips are missing or were rejected.
    """
    configs.refuse_relative_in_job(config, "output")
    output = storage.absolute(config.output)
    storage.check_writable(output)
    missing = Missing()
    clips = missing.noted(SOURCES[config.source.name](config.source))
    plan = make_plan(clips, config.shards, config.seed, _settings(config))
    _check_missing(config, plan, missing)
    _claim(plan, output)
    _publish(_repeatable(config).encode(), output, "config.yaml")
    done = _finished(plan, output)
    if done.outcomes:
        log.info("%d of %d shards are there already", len(done.outcomes), len(plan.cuts))
    todo = [cut for cut in plan.cuts if cut.name not in done.outcomes]
    if todo and not ray.is_initialized():
        ray.init(logging_level=logging.WARNING)
    running = _run(config, plan, todo, output) if todo else iter(())
    for finished in logs.progress(running, "shards", len(todo), lambda: str(done)):
        done.add(finished)
        _check_budget(config, plan, done.reasons)
    _check_budget(config, plan, done.reasons)
    dataset = _dataset(config, plan, done)
    _publish(dataset.model_dump_json(indent=1).encode(), output, "dataset.json")
    page = report.render(output, dataset, done.reasons, [o.histograms for o in done.outcomes.values()])
    _publish(page.encode(), output, report.NAME)
    return Built(dataset, done.reasons)


def _repeatable(config: BuildConfig) -> str:
    """The preset that builds the same bytes at any output."""
    values = config.model_dump(mode="json", exclude={"output", "workers", "cpus_per_task"})
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def summary(built: Built, output: str) -> str:
    """What was built, as a table, and what was not."""
    dataset, reasons = built
    lines = [f"{'split':<10}{'shards':>8}{'videos':>12}{'captions':>12}{'MB':>12}"]
    for name, split in dataset.splits.items():
        size = sum(s.bytes for s in split.shards) / 1e6
        lines.append(f"{name:<10}{len(split.shards):>8,}{split.samples:>12,}{split.captions:>12,}{size:>12,.1f}")
    if reasons:
        lines.append(f"rejected: {reasons.total():,} ({_list(reasons)}); the shards' markers name each")
    output = storage.absolute(output)
    return "\n".join([*lines, f"dataset: {output}", f"report:  {storage.join(output, report.NAME)}"])


def _settings(config: BuildConfig) -> dict[str, Any]:
    """What the bytes of a shard depend on besides its clips."""
    encoder = config.video.model_dump(mode="json", exclude={"timeout_s"})
    settings = {"payload": config.payload, "video": encoder, "ffmpeg": video.ffmpeg_version()}
    if config.payload == "frames":
        settings.update(frames=config.frames.model_dump(mode="json"), pillow=PIL.__version__)
    return settings


class Missing:
    """Counts the clips that have no file, and keeps the names of a few."""

    def __init__(self) -> None:
        self.count = 0
        self.names: list[str] = []

    def noted(self, clips: Iterable[Clip]) -> Iterator[Clip]:
        for clip in clips:
            if clip.size is None:
                self.count += 1
                self.names.extend([clip.video] if len(self.names) < 10 else [])
            yield clip


def _check_missing(config: BuildConfig, plan: Plan, missing: Missing) -> None:
    if not missing.count:
        return
    names = ", ".join(missing.names) + (", …" if missing.count > len(missing.names) else "")
    what = (
        f"{missing.count:,} of {plan.num_clips:,} clips have no file in source.videos={config.source.videos} ({names})"
    )
    if missing.count > config.max_missing_fraction * plan.num_clips:
        raise RunError(
            f"{what}, more than max_missing_fraction={config.max_missing_fraction:g} allows: "
            "correct source.videos, download them first (this does not), or raise it"
        )
    log.warning("%s; they are rejected, and the shards' markers name each", what)


def _claim(plan: Plan, output: str) -> None:
    """Publish plan.json, or see that the one which is there is the same."""
    url = storage.join(output, "plan.json")
    splits = Counter(cut.split for cut in plan.cuts)
    mine = {"hash": plan.hash, **plan.settings, "clips": plan.num_clips, "splits": dict(splits)}
    try:
        storage.publish_bytes(json.dumps(mine, indent=1).encode(), url, if_none_match=True)
    except AlreadyExistsError:
        theirs = json.loads(storage.read(url))
        if theirs.get("hash") == plan.hash:
            return
        differing = [k for k in _flat(mine) if k != "hash" and _flat(mine)[k] != _flat(theirs).get(k)]
        what = ", ".join(differing) or "the annotations, videos or split fractions"
        raise RunError(
            f"{output} holds a dataset of another plan (changed: {what}): choose another output, or delete that one"
        ) from None


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value})
    return flat


def _finished(plan: Plan, output: str) -> Done:
    """The shards that need no more work: their marker is of this plan, and their tar is as long as it says."""
    there = {entry.url: entry.size for entry in storage.list_files(output)}

    def read(cut: Cut) -> Outcome | None:
        tar, marker = (storage.join(output, name) for name in (cut.name, shards.marker_name(cut.name)))
        if tar not in there or marker not in there:
            return None
        index = shards.read_marker(output, cut.name)
        return outcome(cut.name, index) if (index.plan_hash, index.bytes) == (plan.hash, there[tar]) else None

    with ThreadPoolExecutor(16) as pool:
        return Done(found for found in pool.map(read, plan.cuts) if found is not None)


def _run(config: BuildConfig, plan: Plan, todo: list[Cut], output: str) -> Iterator[Outcome]:
    """Build shards, a bounded number at once, and yield each as it is finished.

    Ray itself retries nothing: a shard whose worker or node died, or whose storage failed, waits and is tried again.
    """
    cpus = config.cpus_per_task or config.video.threads
    task = ray.remote(write_shard).options(num_cpus=cpus, max_retries=0, scheduling_strategy="SPREAD")
    recipe = Recipe(storage.absolute(config.source.videos), config.payload, config.video, config.frames)
    waiting = [(0.0, place) for place in range(len(todo))]  # a heap: when it may begin, which
    failures: Counter[int] = Counter()
    running: dict[Any, int] = {}
    if not _room(cpus):
        raise ConfigError(f"cpus_per_task={cpus} is more than any Ray node has: lower it")
    while waiting or running:
        limit = min(config.workers or sys.maxsize, max(1, _room(cpus)))  # nodes come and go
        while waiting and len(running) < limit and waiting[0][0] <= time.monotonic():
            _, place = heapq.heappop(waiting)
            running[task.remote(plan.shard(todo[place]), plan.hash, output, recipe)] = place
        if not running:
            time.sleep(max(0.0, waiting[0][0] - time.monotonic()))
            continue
        finished, _ = ray.wait(list(running), timeout=5.0 if waiting else None)
        for reference in finished:
            place = running.pop(reference)
            try:
                yield ray.get(reference)
            except ray.exceptions.RayError as error:
                failures[place] += 1
                wait_s = FIRST_WAIT_S * 2 ** (failures[place] - 1)
                reason = _temporary(error, todo[place].name, is_last=failures[place] == ATTEMPTS)
                log.warning("shard %s: %s; again in %.0f s", todo[place].name, reason, wait_s)
                heapq.heappush(waiting, (time.monotonic() + wait_s, place))


def _temporary(error: ray.exceptions.RayError, shard: str, is_last: bool) -> str:
    """Why a shard failed, if it may succeed on another attempt; raises what is to be told if not."""
    known = told(error)
    if known is None and isinstance(error, ray.exceptions.RayTaskError):
        raise error  # a defect of ours keeps its traceback
    reason = str(known or error).strip().splitlines()[0]
    if known is not None and not isinstance(known, RunError | StorageError):
        raise known
    if is_last:
        kind = type(known) if known else RunError
        raise kind(f"shard {shard} could not be built in {ATTEMPTS} attempts ({reason}): run again to go on") from None
    return reason


def _publish(data: bytes, output: str, name: str) -> None:
    """Publish a file of the driver's own; a build of days is not lost to a minute without storage."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return storage.publish_bytes(data, storage.join(output, name))
        except StorageError as error:
            if attempt == ATTEMPTS:
                raise
            wait_s = FIRST_WAIT_S * 2 ** (attempt - 1)
            log.warning("%s; again in %.0f s", error, wait_s)
            time.sleep(wait_s)


def _room(cpus: int) -> int:
    """How many tasks the cluster holds now."""
    return sum(int(node["Resources"].get("CPU", 0)) // cpus for node in ray.nodes() if node["Alive"])


def _check_budget(config: BuildConfig, plan: Plan, reasons: Counter[str]) -> None:
    """Raise RunError as soon as the finished shards alone have too many rejected clips."""
    rejected = reasons.total()
    unreadable = rejected - reasons[MISSING]  # those without a file have a limit of their own
    if rejected and (rejected == plan.num_clips or unreadable > config.max_rejected_fraction * plan.num_clips):
        raise RunError(
            f"{rejected:,} of {plan.num_clips:,} clips were rejected, more than "
            f"max_rejected_fraction={config.max_rejected_fraction:g} allows ({_list(reasons)}): correct the videos "
            "and choose a new output, or raise it and run again"
        )


def _list(reasons: Counter[str]) -> str:
    most = [f"{count:,} × {reason}" for reason, count in reasons.most_common(5)]
    return "; ".join(most + (["…"] if len(reasons) > 5 else []))


def _dataset(config: BuildConfig, plan: Plan, done: Done) -> DatasetIndex:
    splits: dict[str, list[ShardEntry]] = {}
    for cut in plan.cuts:
        entry = done.outcomes[cut.name].entry
        if entry.samples:  # else every clip was rejected
            splits.setdefault(cut.split, []).append(entry)
    return DatasetIndex(
        payload=config.payload,
        plan_hash=plan.hash,
        splits={name: SplitIndex(shards=entries) for name, entries in splits.items()},
        rejected=done.reasons.total(),
    )


def main() -> int:
    config = configs.from_command_line(BuildConfig, PRESETS, "datasets_prep.build")
    logs.setup()
    built = build(config)
    print(summary(built, config.output))
    return 0


if __name__ == "__main__":
    exit_with(main)
