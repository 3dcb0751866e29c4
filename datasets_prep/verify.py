"""Read a finished dataset back and compare every shard's bytes, members and samples with the indexes.

OUTPUT is the folder or s3://bucket/prefix that datasets_prep.build wrote. The exit code is 0 only if all is right.
"""

import logging
import sys
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import logs, shards, storage
from common.errors import ConfigError, DataError, StorageError, exit_with
from common.shards import ShardEntry, ShardIndex
from datasets_prep.shard_writer import members_of

log = logging.getLogger(__name__)
THREADS = 4


def verify(output: str) -> int:
    """The number of samples, all as the indexes say.

    Raises:
        DataError: naming every shard that is not; each one's fault is logged.
    """
    dataset, _ = shards.read_dataset(output)
    entries = [(split, entry) for split, index in dataset.splits.items() for entry in index.shards]
    bad: list[str] = []
    seen: dict[tuple[str, str], str] = {}  # (split, video id) → shard

    def check(item: tuple[str, ShardEntry]) -> list[str] | DataError:
        try:
            return check_shard(output, item[1], dataset.plan_hash)
        except (DataError, StorageError) as error:
            return DataError(str(error))

    with ThreadPoolExecutor(THREADS) as pool:
        results = zip(entries, pool.map(check, entries), strict=True)
        for (split, entry), result in logs.progress(results, "shards", len(entries)):
            twice = [v for v in result if (split, v) in seen] if isinstance(result, list) else []
            if twice:
                result = DataError(f"{entry.name}: video {twice[0]!r} is also in {seen[split, twice[0]]}")
            if isinstance(result, DataError):
                log.error("%s", result)
                bad.append(entry.name)
            else:
                seen.update(((split, video), entry.name) for video in result)
    if bad:
        raise DataError(f"{len(bad)} of {len(entries)} shards are damaged: {', '.join(bad)}; delete and build again")
    return len(seen)


def check_shard(output: str, entry: ShardEntry, plan_hash: str) -> list[str]:
    """The video ids of a shard that is as dataset.json and its marker say. Raises DataError, StorageError."""
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
    return [s.video_id for s in marker.samples]


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


def main() -> int:
    usage = "python -m datasets_prep.verify OUTPUT"
    arguments = [a.removeprefix("output=") for a in sys.argv[1:]]
    if "--help" in arguments or "-h" in arguments:
        print(f"{usage}\n\n{(__doc__ or '').strip()}")
        return 0
    if len(arguments) != 1:
        raise ConfigError(f"expected one dataset, got {len(arguments)}: {usage}")
    logs.setup()
    output = storage.absolute(arguments[0])
    print(f"{verify(output):,} videos in {output} are as its indexes say")
    return 0


if __name__ == "__main__":
    exit_with(main)
