"""Build a dataset: annotations and videos → WebDataset shards, as Ray tasks, one per shard.

Starting the same build on the same output again goes on where it stopped. Ray: the cluster of RAY_ADDRESS, else a
local one. `python -m datasets_prep.verify OUTPUT` reads a finished dataset back.
"""

import json
import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import ray
import ray.exceptions

from common import config as configs
from common import logs, shards, storage
from common.errors import AlreadyExistsError, ConfigError, RunError, exit_with, told
from common.shards import DatasetIndex, ShardEntry, ShardIndex, SplitIndex
from datasets_prep import video
from datasets_prep.config import PRESETS, BuildConfig
from datasets_prep.plan import Plan, Shard, make_plan
from datasets_prep.shard_writer import write_shard
from datasets_prep.sources import SOURCES

log = logging.getLogger(__name__)
Done = dict[str, ShardIndex]  # by the shard's name


class Built(NamedTuple):
    """A finished dataset, and how many clips are not in it for which reason."""

    dataset: DatasetIndex
    reasons: Counter[str]


def build(config: BuildConfig) -> Built:
    """Build, or go on building, the dataset at `config.output`. Starts Ray only when there is work for it.

    Raises:
        ConfigError, DataError, StorageError: as one sentence.
        RunError: another plan is at the output, or too many clips were rejected.
    """
    configs.refuse_relative_in_job(config, "output")
    output = storage.absolute(config.output)
    storage.check_writable(output)
    clips = SOURCES[config.source.name](config.source)
    plan = make_plan(clips, config.shards, config.seed, _settings(config))
    del clips
    _claim(plan, output)
    done = _finished(plan, output)
    if done:
        log.info("%d of %d shards are there already", len(done), len(plan.shards))
    missing = [shard for shard in plan.shards if shard.name not in done]
    if missing and not ray.is_initialized():
        ray.init(logging_level=logging.WARNING)
    running = _run(config, plan.hash, missing, output) if missing else iter(())
    for shard, index in logs.progress(running, "shards", len(missing)):
        done[shard.name] = index
        _check_budget(config, plan, done)
    _check_budget(config, plan, done)
    dataset = _dataset(plan, done)
    storage.publish_bytes(dataset.model_dump_json(indent=1).encode(), storage.join(output, "dataset.json"))
    return Built(dataset, _reasons(done))


def summary(built: Built, output: str) -> str:
    """What was built, as a table, and what was not."""
    dataset, reasons = built
    lines = [f"{'split':<10}{'shards':>8}{'videos':>12}{'captions':>12}{'MB':>12}"]
    for name, split in dataset.splits.items():
        size = sum(s.bytes for s in split.shards) / 1e6
        lines.append(f"{name:<10}{len(split.shards):>8,}{split.samples:>12,}{split.captions:>12,}{size:>12,.1f}")
    if reasons:
        lines.append(f"rejected: {reasons.total():,} ({_list(reasons)}); the shards' markers name each")
    return "\n".join([*lines, f"dataset: {storage.absolute(output)}"])


def _settings(config: BuildConfig) -> dict[str, Any]:
    """What the bytes of a shard depend on besides its clips."""
    encoder = config.video.model_dump(mode="json", exclude={"timeout_s"})
    return {"payload": "video", "video": encoder, "ffmpeg": video.ffmpeg_version()}


def _claim(plan: Plan, output: str) -> None:
    """Publish plan.json, or see that the one which is there is the same."""
    url = storage.join(output, "plan.json")
    splits = Counter(s.split for s in plan.shards)
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

    def read(shard: Shard) -> ShardIndex | None:
        tar, marker = (storage.join(output, name) for name in (shard.name, shards.marker_name(shard.name)))
        if tar not in there or marker not in there:
            return None
        index = shards.read_marker(output, shard.name)
        return index if (index.plan_hash, index.bytes) == (plan.hash, there[tar]) else None

    with ThreadPoolExecutor(16) as pool:
        found = zip(plan.shards, pool.map(read, plan.shards), strict=True)
        return {shard.name: index for shard, index in found if index is not None}


def _run(config: BuildConfig, plan_hash: str, missing: list[Shard], output: str) -> Iterator[tuple[Shard, ShardIndex]]:
    """Build shards, a bounded number at once, and yield each as it is finished."""
    waiting = iter(missing)
    cpus = config.cpus_per_task or config.video.threads
    task = ray.remote(write_shard).options(num_cpus=cpus)
    source = storage.absolute(config.source.videos)
    settings = config.video.model_dump(mode="json")
    running: dict[Any, Shard] = {}
    limit = min(config.workers or sys.maxsize, _room(cpus))
    while True:
        while len(running) < limit and (shard := next(waiting, None)):
            running[task.remote(shard, plan_hash, source, output, settings)] = shard
        if not running:
            return
        finished, _ = ray.wait(list(running))
        shard = running.pop(finished[0])
        yield shard, _result(finished[0], shard)


def _result(reference: Any, shard: Shard) -> ShardIndex:
    try:
        index: ShardIndex = ray.get(reference)
    except ray.exceptions.RayError as error:
        known = told(error)
        if known is None and isinstance(error, ray.exceptions.RayTaskError):
            raise  # a defect of ours keeps its traceback
        reason = str(error).strip().splitlines()[0]
        raise known or RunError(f"shard {shard.name} could not be built ({reason}): run again to go on") from None
    return index


def _room(cpus: int) -> int:
    """How many tasks the cluster holds now. Raises ConfigError if no node ever could take one."""
    sizes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    room = sum(size // cpus for size in sizes)
    if not room:
        raise ConfigError(
            f"cpus_per_task={cpus} is more than any Ray node has (at most {max(sizes, default=0)}): lower it"
        )
    return room


def _check_budget(config: BuildConfig, plan: Plan, done: Done) -> None:
    """Raise RunError as soon as the finished shards alone have too many rejected clips."""
    reasons = _reasons(done)
    rejected = reasons.total()
    if rejected and (rejected == plan.num_clips or rejected > config.max_rejected_fraction * plan.num_clips):
        raise RunError(
            f"{rejected:,} of {plan.num_clips:,} clips were rejected, more than "
            f"max_rejected_fraction={config.max_rejected_fraction:g} allows ({_list(reasons)}): correct the videos "
            "and choose a new output, or raise it and run again"
        )


def _reasons(done: Done) -> Counter[str]:
    return Counter(r.reason for index in done.values() for r in index.rejected)


def _list(reasons: Counter[str]) -> str:
    most = [f"{count:,} × {reason}" for reason, count in reasons.most_common(5)]
    return "; ".join(most + (["…"] if len(reasons) > 5 else []))


def _dataset(plan: Plan, done: Done) -> DatasetIndex:
    splits: dict[str, list[ShardEntry]] = {}
    for shard in plan.shards:
        index = done[shard.name]
        if not index.samples:  # every clip was rejected
            continue
        entry = ShardEntry(
            name=shard.name,
            samples=len(index.samples),
            captions=sum(s.num_captions for s in index.samples),
            bytes=index.bytes,
            sha256=index.sha256,
        )
        splits.setdefault(shard.split, []).append(entry)
    return DatasetIndex(
        payload="video",
        plan_hash=plan.hash,
        splits={name: SplitIndex(shards=entries) for name, entries in splits.items()},
        rejected=_reasons(done).total(),
    )


def main() -> int:
    config = configs.from_command_line(BuildConfig, PRESETS, "datasets_prep.build")
    logs.setup()
    built = build(config)
    print(summary(built, config.output))
    return 0


if __name__ == "__main__":
    exit_with(main)
