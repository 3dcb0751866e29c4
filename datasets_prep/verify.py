"""Read a finished dataset back and compare every shard's bytes, members and samples with the indexes.

OUTPUT is the folder or s3://bucket/prefix that datasets_prep.build or datasets_prep.index wrote. Every video is opened
and its first, middle and last frame decoded. The exit code is 0 only if all is right.

--repair deletes the shards that are not, and builds them again from the videos by OUTPUT/config.yaml.
--rejected only lists the clips that are in no shard, as CSV: shard, video, reason.
"""

import csv
import hashlib
import io
import json
import logging
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common import config as configs
from common import logs, shards, storage
from common.errors import ConfigError, DataError, NotFoundError, StorageError, exit_with
from common.shards import DatasetIndex, Rejected, SampleIndex, ShardEntry, ShardIndex
from datasets_prep.check import check
from datasets_prep.config import BuildConfig
from datasets_prep.shard_writer import members_of

log = logging.getLogger(__name__)


class Checked(NamedTuple):
    """What is kept of a shard that is right: 8 bytes a sample."""

    ids: NDArray[np.uint64]  # hashes of its video ids
    rejected: int


def verify(output: str) -> int:
    """The number of samples, all as the indexes say.

    Raises:
        DataError: naming every shard that is not; each one's fault is logged.
    """
    dataset, _ = shards.read_dataset(output)
    bad, rejected = check_all(output, dataset)
    if bad:
        total = sum(len(split.shards) for split in dataset.splits.values())
        raise DataError(f"{len(bad)} of {total} shards are damaged: {', '.join(bad)}; --repair builds them again")
    _check_sums(output, dataset, rejected)
    return sum(split.samples for split in dataset.splits.values())


def check_all(output: str, dataset: DatasetIndex) -> tuple[list[str], int]:
    """The names of the shards that are not as the indexes say, each one's fault logged, and the others' rejected."""
    bad: list[str] = []
    rejected = 0

    def check_one(entry: ShardEntry) -> Checked | DataError:
        try:
            return check_shard(output, entry, dataset.plan_hash)
        except (DataError, StorageError) as error:
            return DataError(str(error))

    entries = [(split, entry) for split, index in dataset.splits.items() for entry in index.shards]
    good: dict[str, list[tuple[ShardEntry, Checked]]] = {split: [] for split in dataset.splits}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = zip(entries, pool.map(check_one, (entry for _, entry in entries)), strict=True)
        with logs.progress(results, "shards", len(entries)) as checked:
            for (split, entry), result in checked:
                if isinstance(result, DataError):
                    log.error("%s", result)
                    bad.append(entry.name)
                else:
                    good[split].append((entry, result))
                    rejected += result.rejected
    for split in good:
        bad += _repeating(output, good[split])
    return bad, rejected


def _repeating(output: str, good: list[tuple[ShardEntry, Checked]]) -> list[str]:
    """The shards of a split with a video that is in one before, each one logged."""
    ids = np.concatenate([np.empty(0, np.uint64), *(checked.ids for _, checked in good)])
    ids.sort()
    suspects = np.unique(ids[1:][ids[1:] == ids[:-1]])
    bad, first = [], dict[str, str]()
    for entry, checked in good if len(suspects) else []:
        if not np.isin(checked.ids, suspects).any():
            continue
        # Read again for the names: two different ones may have one hash.
        for sample in shards.read_marker(output, entry.name).samples:
            if sample.video_id in first and entry.name not in bad:
                log.error("%s: video %r is also in %s", entry.name, sample.video_id, first[sample.video_id])
                bad.append(entry.name)
            first.setdefault(sample.video_id, entry.name)
    return bad


def repair(output: str) -> list[str]:
    """Build the damaged shards again; their names.

    Raises:
        ConfigError: the dataset was not built by datasets_prep.build, so there is nothing to build it from.
        DataError: a shard is damaged still.
    """
    from datasets_prep.build import build  # imports ray

    dataset, _ = shards.read_dataset(output)
    bad, _ = check_all(output, dataset)
    if not bad:
        return []
    preset = storage.join(output, "config.yaml")
    if not storage.exists(preset):
        raise ConfigError(f"{output} holds no config.yaml, so it can't be built again: its tars are someone else's")
    config = configs.load(BuildConfig, preset, [f"output={output}"])
    for name in bad:
        storage.delete(storage.join(output, shards.marker_name(name)))
        storage.delete(storage.join(output, name))
    build(config)
    verify(output)
    return bad


def rejected_clips(output: str) -> Iterator[tuple[str, Rejected]]:
    """(shard, clip and reason) of every clip that was rejected, by the markers, also those of an unfinished build.

    Raises:
        DataError: there is no dataset.
    """
    names = set(_markers(output))
    try:
        dataset, _ = shards.read_dataset(output)
        names.update(entry.name for split in dataset.splits.values() for entry in split.shards)  # tars of someone else
    except DataError:
        if not names:
            raise
    for name in sorted(names):
        for clip in shards.read_marker(output, name).rejected:
            yield name, clip


def _markers(output: str) -> list[str]:
    """The shards that have a marker, also those without a sample, which dataset.json does not list."""
    root = storage.absolute(output).rstrip("/") + "/"  # as listed files are named
    names = [entry.url.removeprefix(root) for entry in storage.list_files(output)]
    is_marker = [name.endswith(".json") and "/shard-" in name for name in names]
    return sorted(name.removesuffix(".json") + ".tar" for name, is_one in zip(names, is_marker, strict=True) if is_one)


def check_shard(output: str, entry: ShardEntry, plan_hash: str) -> Checked:
    """A shard that is as dataset.json and its marker say. Raises DataError, StorageError."""
    marker = shards.read_marker(output, entry.name)
    listed = (entry.sha256, entry.bytes, entry.samples, entry.captions, plan_hash)
    captions = sum(s.num_captions for s in marker.samples)
    if listed != (marker.sha256, marker.bytes, len(marker.samples), captions, marker.plan_hash):
        raise DataError(f"{entry.name}: its marker is not the one that dataset.json was made from")
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder) / "shard.tar"
        shards.fetch_shard(output, entry, tar)
        try:
            _check_members(tar, entry, marker)
        except tarfile.TarError as error:
            raise DataError(f"{entry.name} is no tar: {error}") from None
    ids = [hashlib.blake2b(s.video_id.encode(), digest_size=8).digest() for s in marker.samples]
    return Checked(np.frombuffer(b"".join(ids), np.uint64), len(marker.rejected))


def _check_members(tar: Path, entry: ShardEntry, marker: ShardIndex) -> None:
    marked = {s.key: s.members for s in marker.samples}
    # A tar of someone else still holds what was rejected, named by its key.
    rejected = {r.video_id for r in marker.rejected} - marked.keys()
    if {key: found for key, found in members_of(tar).items() if key not in rejected} != marked:
        raise DataError(f"{entry.name}: its members are not those of its marker")
    with open(tar, "rb") as file:
        for sample in marker.samples:
            info = shards.read_info(file, sample)
            found = (info.video_id, info.source_id, len(info.captions))
            if found != (sample.video_id, sample.source_id, sample.num_captions):
                raise DataError(f"{entry.name}: {sample.key}.json is of another clip than its marker says")
            try:
                _check_pictures(file, sample)
            except DataError as error:
                raise DataError(f"{entry.name}: video {sample.video_id}: {error}") from None


def _check_pictures(tar: BinaryIO, sample: SampleIndex) -> None:
    import simplejpeg  # what training decodes with

    for suffix in sample.pictures:
        if suffix.endswith("jpg"):
            try:
                simplejpeg.decode_jpeg(shards.read_member(tar, sample, suffix))
            except ValueError as error:
                raise DataError(f"{suffix} cannot be decoded: {error}") from None
        else:
            check(io.BytesIO(shards.read_member(tar, sample, suffix)), every_frame=False)


def _check_sums(output: str, dataset: DatasetIndex, rejected: int) -> None:
    """Every clip of the plan is in a shard or rejected by a marker, also by one whose shard is empty."""
    try:
        planned = json.loads(storage.read(storage.join(output, "plan.json")))["clips"]
    except NotFoundError:  # an index of someone else's tars has no plan
        return
    listed = {entry.name for split in dataset.splits.values() for entry in split.shards}
    for name in _markers(output):
        if name not in listed:
            rejected += len(shards.read_marker(output, name).rejected)
    samples = sum(split.samples for split in dataset.splits.values())
    if (rejected, samples + rejected) != (dataset.rejected, planned):
        raise DataError(
            f"{output}: of {planned:,} planned clips {samples:,} are in shards and {rejected:,} rejected by markers, "
            f"{dataset.rejected:,} by dataset.json: delete dataset.json and build again"
        )


def main() -> int:
    usage = "python -m datasets_prep.verify OUTPUT [--repair | --rejected]"
    arguments = [a.removeprefix("output=") for a in sys.argv[1:]]
    if "--help" in arguments or "-h" in arguments:
        print(f"{usage}\n\n{(__doc__ or '').strip()}")
        return 0
    is_repair, is_list = "--repair" in arguments, "--rejected" in arguments
    arguments = [a for a in arguments if a not in ("--repair", "--rejected")]
    if len(arguments) != 1:
        raise ConfigError(f"expected one dataset, got {len(arguments)}: {usage}")
    logs.setup()
    output = storage.absolute(arguments[0])
    if is_list:
        csv.writer(sys.stdout).writerows((name, clip.video_id, clip.reason) for name, clip in rejected_clips(output))
    elif is_repair:
        repaired = repair(output)
        print(f"built again: {', '.join(repaired)}" if repaired else "nothing to repair")
    else:
        print(f"{verify(output):,} videos in {output} are as its indexes say")
    return 0


if __name__ == "__main__":
    exit_with(main)
