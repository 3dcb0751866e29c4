"""Make a dataset of WebDataset tars that someone else wrote, where they lie: markers beside them and a dataset.json.

FOLDER is a local folder or s3://bucket/prefix; the tars in it and below hold KEY.mp4 with KEY.txt or KEY.json, as
video2dataset and open_clip have them. They are read once and not changed. A tar below a folder named train, val,
validation or test is of that split. Starting it again reads only the tars that are new or of another size.
Ray: the cluster of RAY_ADDRESS, else a local one.
"""

import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from common import config as configs
from common import logs, retry, shards, storage
from common.errors import ConfigError, DataError, NoBucketError, NotFoundError, RunError, exit_with
from common.shards import DatasetIndex, SplitIndex
from datasets_prep import report, tasks
from datasets_prep.build import Built, most, summary
from datasets_prep.config import IndexConfig
from datasets_prep.shard_reader import Summary, index_tar, summarise

log = logging.getLogger(__name__)
SPLITS = ("train", "val", "validation", "test")
OURS = "index:"  # how the plan hash of an indexed dataset begins; that of a build is a bare sha256
USAGE = "python -m datasets_prep.index FOLDER [split=train] [caption=KEY] [key=value ...] [--print] [--help]"


def index(config: IndexConfig) -> Built:
    """Index, or go on indexing, the tars below `config.folder`. Starts Ray only when there is work for it.

    Raises:
        ConfigError, StorageError: as one sentence.
        DataError: there is nothing to index, a file is in the way, a tar is broken, or a video id occurs twice.
        RunError: too many samples were rejected.
    """
    configs.refuse_relative_in_job(config, "folder")
    folder = storage.absolute(config.folder)
    _refuse_a_build(folder)
    plan_hash = _plan_hash(config)
    sizes = _tars(folder)
    done, stale = _finished(folder, plan_hash, sizes)
    missing = [name for name in sizes if name not in done]
    if done:
        log.info("%d of %d tars are indexed already", len(done), len(sizes))
    if stale:  # it would not fit the markers while they are replaced
        storage.delete(storage.join(folder, "dataset.json"))
    if missing:
        storage.check_writable(folder)
    seen: dict[tuple[str, str], str] = {}
    for found in done.values():
        _refuse_twice(seen, config, found)
    settings = config.model_dump(mode="json")
    running = tasks.run(index_tar, missing, lambda i: (folder, missing[i], plan_hash, settings), config.workers)
    with logs.progress(running, "tars", len(missing)) as indexed:
        for found in indexed:
            done[found.entry.name] = found
            _refuse_twice(seen, config, found)
    dataset = _dataset(config, plan_hash, [done[name] for name in sizes])
    reasons = _reasons(done.values())
    _publish(dataset.model_dump_json(indent=1), storage.join(folder, "dataset.json"))
    page = report.render(folder, dataset, reasons, [found.histograms for found in done.values()])
    _publish(page, storage.join(folder, report.NAME))
    return Built(dataset, reasons)


def _refuse_a_build(folder: str) -> None:
    try:
        dataset, _ = shards.read_dataset(folder)
    except NoBucketError:
        raise
    except DataError:
        if storage.exists(storage.join(folder, "dataset.json")):
            raise DataError(f"{folder} holds a dataset.json that is not ours: move it away") from None
        is_built = storage.exists(storage.join(folder, "plan.json"))  # by a build that has not finished
    else:
        is_built = not dataset.plan_hash.startswith(OURS)
    if is_built:
        raise DataError(
            f"{folder} is the output of datasets_prep.build and needs no other index: read it as it is, "
            "or finish it by datasets_prep.build"
        )
    page = storage.join(folder, report.NAME)
    if storage.exists(page) and report.TITLE.encode() not in storage.read(page):
        raise DataError(f"{page} is in the place of our report and not ours: move it away")


def _plan_hash(config: IndexConfig) -> str:
    """Names the rules that made the markers. What was indexed is named by each tar's sha256: a set of tars may grow."""
    rules = {"version": 1, **config.model_dump(include={"caption", "video_ids"})}
    return OURS + hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def _tars(folder: str) -> dict[str, int]:
    """Name → bytes of every tar, sorted, so that the order of the shards is the same on any storage."""
    names = ((entry.url.removeprefix(folder.rstrip("/") + "/"), entry.size) for entry in storage.list_files(folder))
    tars = {name: size for name, size in sorted(names) if name.endswith(".tar")}
    if not tars:
        raise DataError(f"there is no .tar in {folder} or below it: nothing to index")
    for name in ("dataset.tar", "plan.tar"):
        if name in tars:
            raise DataError(f"{folder}/{name}: rename it, its marker would take the name of the dataset's own file")
    return tars


def _finished(folder: str, plan_hash: str, sizes: dict[str, int]) -> tuple[dict[str, Summary], list[str]]:
    """The tars that need no more work, and the names of those whose marker is of other options or another tar.

    Raises DataError if a file that is no marker of ours is in a marker's place.
    """

    def read(name: str) -> Summary | bool:
        """False without a marker, True with a stale one."""
        try:
            marker = shards.read_marker(folder, name)
        except NotFoundError:
            return False
        except DataError:
            marker = None
        if marker is None or not marker.plan_hash.startswith(OURS):
            path = storage.join(folder, shards.marker_name(name))
            raise DataError(f"{path} is in the place of the marker of {name} and not ours: move it, or rename the tar")
        return summarise(name, marker) if (marker.plan_hash, marker.bytes) == (plan_hash, sizes[name]) else True

    with ThreadPoolExecutor(16) as pool:
        found = dict(zip(sizes, pool.map(read, sizes), strict=True))
    return {n: s for n, s in found.items() if isinstance(s, Summary)}, [n for n, s in found.items() if s is True]


def _refuse_twice(seen: dict[tuple[str, str], str], config: IndexConfig, found: Summary) -> None:
    """Note a tar's video ids, by split and id; raise DataError for one that is there already."""
    name = found.entry.name
    split = _split_of(name, config)
    for video_id in found.video_ids:
        if (split, video_id) in seen:
            first, second = sorted([seen[split, video_id], name])
            raise DataError(
                f"video id {video_id!r} is in {first} and again in {second}, both of split {split!r}: "
                "give video_ids=tar to name videos by tar and key"
            )
        seen[split, video_id] = name


def _split_of(name: str, config: IndexConfig) -> str:
    top, slash, _ = name.partition("/")
    return top if slash and top in SPLITS else config.split


def _dataset(config: IndexConfig, plan_hash: str, found: list[Summary]) -> DatasetIndex:
    reasons, samples = _reasons(found), sum(s.entry.samples for s in found)
    rejected = reasons.total()
    if not samples or rejected > config.max_rejected_fraction * (samples + rejected):
        raise RunError(
            f"{rejected:,} of {samples + rejected:,} samples were rejected, more than max_rejected_fraction="
            f"{config.max_rejected_fraction:g} allows ({most(reasons) or 'the tars are empty'}): "
            "correct the tars, or raise it"
        )
    splits: dict[str, list[shards.ShardEntry]] = {}
    for of_tar in found:
        if of_tar.entry.samples:  # not every sample was rejected
            splits.setdefault(_split_of(of_tar.entry.name, config), []).append(of_tar.entry)
    return DatasetIndex(
        payload="video",
        plan_hash=plan_hash,
        splits={name: SplitIndex(shards=entries) for name, entries in sorted(splits.items())},
        rejected=rejected,
    )


def _publish(text: str, url: str) -> None:
    if not storage.exists(url) or storage.read(url) != text.encode():
        retry.again(lambda: storage.publish_bytes(text.encode(), url))


def _reasons(found: Iterable[Summary]) -> Counter[str]:
    return sum((s.reasons for s in found), Counter[str]())


def _config(arguments: Sequence[str]) -> IndexConfig:
    if not arguments or (arguments[0].partition("=")[0] in IndexConfig.model_fields and "=" in arguments[0]):
        raise ConfigError(f"no folder given: {USAGE}")
    return configs.validate(IndexConfig, {"folder": arguments[0], **configs.parse_overrides(arguments[1:])})


def main() -> int:
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print(f"{USAGE}\n\n{(__doc__ or '').strip()}\n\n{configs.describe(IndexConfig)}")
        return 0
    config = _config([a for a in arguments if a != "--print"])
    if "--print" in arguments:
        print(configs.dump(config), end="")
        return 0
    logs.setup()
    print(summary(index(config), config.folder))
    return 0


if __name__ == "__main__":
    exit_with(main)
