"""Build a dataset: annotations and videos → WebDataset shards, as Ray tasks, one per shard.

Starting the same build on the same output again goes on where it stopped. Ray: the cluster of RAY_ADDRESS, else a
local one. `python -m datasets_prep.verify OUTPUT` reads a finished dataset back.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import PIL
import yaml

from common import config as configs
from common import logs, retry, shards, storage
from common.errors import AlreadyExistsError, RunError, exit_with
from common.shards import DatasetIndex, ShardEntry, SplitIndex
from datasets_prep import report, tasks, video
from datasets_prep.config import PRESETS, BuildConfig
from datasets_prep.plan import Clip, Cut, Plan, make_plan
from datasets_prep.shard_writer import MISSING, SILENT, Outcome, Recipe, outcome, write_shard
from datasets_prep.sources import SOURCES

log = logging.getLogger(__name__)
JPEG_BYTES_PER_PIXEL = 0.25  # measured on web videos at quality 90


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
    config = with_absolute_paths(config)
    output = config.output
    storage.check_writable(output)
    missing = Missing()
    clips = missing.noted(SOURCES[config.source.name](config.source))
    plan = make_plan(clips, config.shards, config.seed, _settings(config), _sample_bytes(config))
    _check_missing(config, plan, missing)
    _claim(plan, output)
    _publish(_repeatable(config).encode(), output, "config.yaml")
    done = _finished(plan, output)
    if done.outcomes:
        log.info("%d of %d shards are there already", len(done.outcomes), len(plan.cuts))
    todo = [cut for cut in plan.cuts if cut.name not in done.outcomes]
    running = _run(config, plan, todo, output)
    with logs.progress(running, "shards", len(todo), lambda: str(done)) as finished:
        for one in finished:
            done.add(one)
            _check_budget(config, plan, done.reasons)
    _check_budget(config, plan, done.reasons)
    dataset = _dataset(config, plan, done)
    _publish(dataset.model_dump_json(indent=1).encode(), output, "dataset.json")
    page = report.render(output, dataset, done.reasons, [o.histograms for o in done.outcomes.values()])
    _publish(page.encode(), output, report.NAME)
    return Built(dataset, done.reasons)


def with_absolute_paths(config: BuildConfig) -> BuildConfig:
    """`config` with local paths made absolute: its config.yaml is used from another folder.

    Raises:
        ConfigError: a path is relative in a submitted job.
    """
    fields = type(config.source).model_fields
    names = [name for name, field in fields.items() if field.annotation in (str, str | None)]  # files and folders
    configs.refuse_relative_in_job(config, "output", *(f"source.{name}" for name in names))
    given = {name: getattr(config.source, name) for name in names}
    changes = {name: storage.absolute(value) for name, value in given.items() if value is not None}
    source = config.source.model_copy(update=changes)
    return config.model_copy(update={"source": source, "output": storage.absolute(config.output)})


def _repeatable(config: BuildConfig) -> str:
    """The preset that builds the same bytes at any output."""
    values = config.model_dump(mode="json", exclude={"output", "workers", "cpus_per_task"})
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def summary(built: Built, output: str) -> str:
    """What was built, as a table, and what was not."""
    dataset, reasons = built
    output = storage.absolute(output)
    lines = [f"{'split':<10}{'shards':>8}{'videos':>12}{'captions':>12}{'MB':>12}"]
    for name, split in dataset.splits.items():
        size = sum(s.bytes for s in split.shards) / 1e6
        lines.append(f"{name:<10}{len(split.shards):>8,}{split.samples:>12,}{split.captions:>12,}{size:>12,.1f}")
    if reasons:
        lines.append(f"rejected: {reasons.total():,} ({most(reasons)}); {_listing(output)} names each")
    return "\n".join([*lines, f"dataset: {output}", f"report:  {storage.join(output, report.NAME)}"])


def _listing(output: str) -> str:
    return f"python -m datasets_prep.verify {output} --rejected"


def _settings(config: BuildConfig) -> dict[str, Any]:
    """What the bytes of a shard depend on besides its clips."""
    encoder = config.video.model_dump(mode="json", exclude={"timeout_s"})
    settings = {"payload": config.payload, "video": encoder, "ffmpeg": video.ffmpeg_version()}
    if config.payload == "frames":
        settings.update(frames=config.frames.model_dump(mode="json"), pillow=PIL.__version__)
    return settings


def _sample_bytes(config: BuildConfig) -> int | None:
    """What a sample of JPEGs usually takes, whatever its source; of a video the source's size tells more."""
    if config.payload == "video":
        return None
    pixels = config.video.short_side**2 * 16 / 9
    return round(JPEG_BYTES_PER_PIXEL * pixels) * config.frames.segments * config.frames.per_segment


class Missing:
    """Counts the clips that have no file or no caption, and keeps the names of a few; LOG_LEVEL=DEBUG logs all."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.names: list[str] = []

    def noted(self, clips: Iterable[Clip]) -> Iterator[Clip]:
        for clip in clips:
            if clip.size is None or not clip.captions:
                what = "no file" if clip.size is None else "no caption"
                self.counts[what] += 1
                self.names.extend([clip.video] if len(self.names) < 10 else [])
                log.debug("%s: %s", what, clip.video)
            yield clip


def _check_missing(config: BuildConfig, plan: Plan, missing: Missing) -> None:
    total = missing.counts.total()
    if not total:
        return
    names = ", ".join(missing.names) + (", …; LOG_LEVEL=DEBUG names all" if total > len(missing.names) else "")
    lacking = " and ".join(f"{count:,} have {what}" for what, count in missing.counts.items())
    what = f"of {plan.num_clips:,} clips {lacking} (source.videos={config.source.videos}: {names})"
    if total > config.max_missing_fraction * plan.num_clips:
        raise RunError(
            f"{what}, more than max_missing_fraction={config.max_missing_fraction:g} allows: "
            "correct source.videos, download them first (this does not), or raise it"
        )
    log.warning("%s; they are rejected", what)


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
    recipe = Recipe(config.source.videos, config.payload, config.video, config.frames)
    return tasks.run(
        write_shard,
        [f"shard {cut.name}" for cut in todo],
        lambda place: (plan.shard(todo[place]), plan.hash, output, recipe),
        config.workers,
        config.cpus_per_task or config.video.threads,
    )


def _publish(data: bytes, output: str, name: str) -> None:
    retry.again(lambda: storage.publish_bytes(data, storage.join(output, name)))


def _check_budget(config: BuildConfig, plan: Plan, reasons: Counter[str]) -> None:
    """Raise RunError as soon as the finished shards alone have too many rejected clips."""
    # What is missing has a limit of its own.
    found = Counter({reason: n for reason, n in reasons.items() if reason not in (MISSING, SILENT)})
    if found.total() > config.max_rejected_fraction * plan.num_clips:
        raise RunError(
            f"{found.total():,} of {plan.num_clips:,} clips were rejected, more than "
            f"max_rejected_fraction={config.max_rejected_fraction:g} allows ({most(found)}): correct the videos, "
            f"which {_listing(config.output)} names, and choose a new output, or raise it and run again"
        )
    if reasons.total() == plan.num_clips:
        raise RunError(f"all {plan.num_clips:,} clips were rejected ({most(reasons)}): correct the videos")


def most(reasons: Counter[str]) -> str:
    """The commonest reasons, for a sentence."""
    listed = [f"{count:,} × {reason}" for reason, count in reasons.most_common(5)]
    return "; ".join(listed + (["…"] if len(reasons) > 5 else []))


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
