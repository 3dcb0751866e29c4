"""Clips → numbered shards. Pure: the same clips and settings, in any order, give the same plan.

Ten million clips must fit in the driver, so they lie in a temporary file of Arrow columns, and in memory there are a
few numbers for each. A shard's clips become Python objects only when the shard is built.
"""

import hashlib
import json
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from common import shards
from common.errors import DataError
from datasets_prep.config import ShardConfig

ROWS_PER_BATCH = 1 << 16


class Clip(NamedTuple):
    """One video of the dataset to be: a file or a span of it.

    `source_id` names the long video or group; `video` is relative to the source's folder; `size` is that file's
    bytes, divided among its clips, or None where there is no such file.
    """

    split: str
    video_id: str
    source_id: str
    captions: tuple[str, ...]
    video: str
    start: float | None
    end: float | None
    size: int | None


class Shard(NamedTuple):
    """The unit of work: `clips` in the order of the tar."""

    split: str
    number: int
    clips: list[Clip]

    @property
    def name(self) -> str:
        return shards.shard_name(self.split, self.number)


class Cut(NamedTuple):
    """Where a shard lies in the plan's order: positions [start, stop)."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        return shards.shard_name(self.split, self.number)


class Clips:
    """Many clips in a file that is gone with this object: batches of equal length, so a row is found by its number.

    `source_id` and `video` are null where they equal `video_id`.
    """

    SCHEMA = pa.schema(
        {
            "split": pa.uint16(),
            "video_id": pa.string(),
            "source_id": pa.string(),
            "captions": pa.list_(pa.string()),
            "video": pa.string(),
            "start": pa.float64(),
            "end": pa.float64(),
            "size": pa.int64(),
        }
    )

    def __init__(self, clips: Iterable[Clip], seen: Callable[[list[Clip]], None]) -> None:
        """Write the clips, read once as a stream; `seen` gets each batch."""
        self.splits: list[str] = []
        self._codes: dict[str, int] = {}
        stream = iter(clips)
        with tempfile.NamedTemporaryFile(prefix="plan-") as file:
            with pa.ipc.new_file(file, self.SCHEMA) as writer:
                while batch := list(islice(stream, ROWS_PER_BATCH)):
                    writer.write_batch(self._columns(batch))
                    seen(batch)
            file.flush()
            self._file = pa.ipc.open_file(pa.memory_map(file.name))
        self.batches = [self._file.get_batch(i) for i in range(self._file.num_record_batches)]

    def __len__(self) -> int:
        return sum(len(batch) for batch in self.batches)

    def _columns(self, clips: list[Clip]) -> pa.RecordBatch:
        for name in dict.fromkeys(c.split for c in clips):
            self._codes.setdefault(name, len(self._codes))
        self.splits = list(self._codes)
        columns = [
            [self._codes[c.split] for c in clips],
            [c.video_id for c in clips],
            [None if c.source_id == c.video_id else c.source_id for c in clips],
            [c.captions for c in clips],
            [None if c.video == c.video_id else c.video for c in clips],
            *([c[field] for c in clips] for field in (5, 6, 7)),
        ]
        arrays = [pa.array(c, field.type) for c, field in zip(columns, self.SCHEMA, strict=True)]
        return pa.RecordBatch.from_arrays(arrays, schema=self.SCHEMA)

    def column(self, name: str) -> NDArray[Any]:
        """A column of numbers, null as 0."""
        parts = (batch.column(name).fill_null(0).to_numpy(zero_copy_only=False) for batch in self.batches)
        found = np.empty(len(self), self.SCHEMA.field(name).type.to_pandas_dtype())
        for batch, part in enumerate(parts):  # not by np.concatenate, which would need twice the memory
            found[batch * ROWS_PER_BATCH :][: len(part)] = part
        return found

    def take(self, rows: NDArray[np.int64]) -> list[Clip]:
        """The clips of these rows, in this order."""
        found: list[Clip] = [None] * len(rows)  # type: ignore[list-item]
        of_batch = rows // ROWS_PER_BATCH
        for number in np.unique(of_batch):
            places = np.flatnonzero(of_batch == number)
            batch = self.batches[number].take(pa.array(rows[places] % ROWS_PER_BATCH))
            for place, row in zip(places, zip(*(c.to_pylist() for c in batch.columns), strict=True), strict=True):
                split, video_id, source_id, captions, video, *rest = row
                source_id, video = (video_id if name is None else name for name in (source_id, video))
                found[place] = Clip(self.splits[split], video_id, source_id, tuple(captions), video, *rest)
        return found


class Plan(NamedTuple):
    """What a build will do. `hash` names clips and settings: the same hash means the same shards, byte for byte.

    `order` holds the clips' rows in the order of the shards, `cuts` where each shard lies in it.
    """

    hash: str
    settings: dict[str, Any]
    clips: Clips
    order: NDArray[np.int64]
    cuts: list[Cut]

    @property
    def num_clips(self) -> int:
        return len(self.order)

    def shard(self, cut: Cut) -> Shard:
        return Shard(cut.split, cut.number, self.clips.take(self.order[cut.start : cut.stop]))


def make_plan(
    clips: Iterable[Clip], limits: ShardConfig, seed: int, settings: dict[str, Any], sample_bytes: int | None = None
) -> Plan:
    """Deal clips to shards: sources in a seeded order, each whole in one shard where it fits.

    Splits that are not in `limits.shuffle` are in the order of their sources' names.

    Args:
        clips: read once, as a stream.
        settings: everything else that the shards' bytes depend on, as plain data; it goes into the hash.
        sample_bytes: what a clip is expected to become; None = as much as its source file.

    Raises:
        DataError: there is no clip, or a video id occurs twice in a split.
    """
    keys, ids, total = array("Q"), array("Q"), 0

    def note(batch: list[Clip]) -> None:
        nonlocal total
        keys.extend(_key(c, limits, seed) for c in batch)
        ids.extend(_number(f"{c.split}/{c.video_id}") for c in batch)
        # A sum does not depend on the order in which the source gives its clips.
        total += sum(int.from_bytes(hashlib.sha256(json.dumps(c).encode()).digest(), "big") for c in batch)

    table = Clips(map(_writable, clips), note)
    if not table.batches:
        raise DataError("the source has no clips: nothing to build")
    _check_unique(table, np.frombuffer(ids, np.uint64))
    ids = array("Q")
    sized = {} if sample_bytes is None else {"sample_bytes": sample_bytes}
    settings = {**settings, "shards": {**limits.model_dump(mode="json"), **sized}, "seed": seed}
    named = json.dumps({**settings, "clips": [len(table), f"{total % 2**256:x}"]}, sort_keys=True)
    order, is_first = _sorted(table, np.frombuffer(keys, np.uint64))
    keys = array("Q")
    sizes = table.column("size")[order]
    if sample_bytes is not None:
        sizes = np.where(sizes > 0, sample_bytes, 0)
    cuts = _cut(table, order, is_first, sizes, limits)
    return Plan(hashlib.sha256(named.encode()).hexdigest(), settings, table, order, cuts)


def _writable(clip: Clip) -> Clip:
    """A clip whose names can be written as UTF-8; one that had to be changed has no file of that name."""
    try:
        "".join((clip.split, clip.video_id, clip.source_id, clip.video, *clip.captions)).encode()
        return clip
    except UnicodeEncodeError:
        video_id, source_id, video, *captions = (
            text.encode(errors="backslashreplace").decode()
            for text in (clip.video_id, clip.source_id, clip.video, *clip.captions)
        )
        is_named = video == clip.video
        return clip._replace(
            video_id=video_id,
            source_id=source_id,
            video=video,
            captions=tuple(captions),
            size=clip.size if is_named else None,
        )


def _key(clip: Clip, limits: ShardConfig, seed: int) -> int:
    """Sorting by it shuffles sources, or nearly sorts them by name; `_sorted` does the rest among equal keys."""
    if clip.split in limits.shuffle:
        return _number(f"{seed}/{clip.source_id}")
    return int.from_bytes(clip.source_id.encode()[:8].ljust(8, b"\0"), "big")


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _check_unique(table: Clips, ids: NDArray[np.uint64]) -> None:
    ordered = np.sort(ids)
    same = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    seen: set[tuple[str, str]] = set()
    for clip in table.take(np.flatnonzero(np.isin(ids, same))) if len(same) else ():
        # Two names may, once in 10^12 plans, have the same number.
        if (clip.split, clip.video_id) in seen:
            raise DataError(f"video id {clip.video_id!r} occurs twice in split {clip.split!r}: rename one")
        seen.add((clip.split, clip.video_id))


def _sorted(table: Clips, keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Rows by split, key, source, file and id; and, for each place, whether a source begins there."""
    by_name = np.argsort(np.argsort(table.splits)).astype(np.uint16)
    split = by_name[table.column("split")]
    order = np.lexsort((keys, split))
    is_first = np.ones(len(order), bool)
    for values in (split, keys):
        ordered = values[order]
        is_first[1:] &= ordered[1:] == ordered[:-1]
    is_first[1:] ^= True
    for start, stop in _tied(is_first):
        rows = order[start:stop]
        names = [(c.source_id, c.video, c.start or 0.0, c.video_id) for c in table.take(rows)]
        edges = [*np.flatnonzero(is_first[start:stop]).tolist(), stop - start]
        places = [i for a, b in pairwise(edges) for i in sorted(range(a, b), key=names.__getitem__)]
        order[start:stop] = rows[places]
        sources = [names[place][0] for place in places]
        is_first[start + 1 : stop] |= [a != b for a, b in zip(sources[1:], sources, strict=False)]
    return order, is_first


def _tied(is_first: NDArray[np.bool_]) -> list[tuple[int, int]]:
    """Stretches of the order, cut between keys, that have all rows with a key that is not theirs alone."""
    edges = np.append(np.flatnonzero(is_first), len(is_first))
    stretches: list[tuple[int, int]] = []
    for run in np.flatnonzero(np.diff(edges) > 1):
        start, stop = int(edges[run]), int(edges[run + 1])
        if stretches and stop - stretches[-1][0] <= ROWS_PER_BATCH:
            stretches[-1] = stretches[-1][0], stop
        else:
            stretches.append((start, stop))
    return stretches


def _cut(
    table: Clips, order: NDArray[np.int64], is_first: NDArray[np.bool_], sizes: NDArray[np.int64], limits: ShardConfig
) -> list[Cut]:
    max_bytes = limits.max_bytes / limits.compression
    splits = table.column("split")[order]
    cuts: list[Cut] = []
    start, size = 0, 0  # of the shard being filled

    def close(stop: int) -> None:
        nonlocal start, size
        split = table.splits[splits[start]]
        number = cuts[-1].number + 1 if cuts and cuts[-1].split == split else 0
        cuts.append(Cut(split, number, start, stop))
        start, size = stop, 0

    for first, stop, total in _sources(is_first, sizes):
        if first > start and splits[first] != splits[start]:
            close(first)
        # A source that fits nowhere whole is cut; any other starts a new shard rather than being cut.
        is_whole = stop - first <= limits.max_samples and total <= max_bytes
        parts = [(first, stop, total)] if is_whole else [(i, i + 1, int(sizes[i])) for i in range(first, stop)]
        for part, end, part_size in parts:
            if part > start and (end - start > limits.max_samples or size + part_size > max_bytes):
                close(part)
            size += part_size
    close(len(order))
    return cuts


def _sources(is_first: NDArray[np.bool_], sizes: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
    """(start, stop, bytes) of each source."""
    starts = np.flatnonzero(is_first)
    totals = np.add.reduceat(sizes, starts)
    stops = np.append(starts[1:], len(sizes))
    for begin in range(0, len(starts), ROWS_PER_BATCH):  # as Python numbers, but not all at once
        part = slice(begin, begin + ROWS_PER_BATCH)
        yield from zip(starts[part].tolist(), stops[part].tolist(), totals[part].tolist(), strict=True)
