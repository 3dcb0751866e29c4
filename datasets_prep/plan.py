"""Clips → numbered shards. Pure: the same clips and settings, in any order, give the same plan."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise
from operator import attrgetter
from typing import Any, NamedTuple

from common import shards
from common.errors import DataError
from datasets_prep.config import ShardConfig


class Clip(NamedTuple):
    """One video of the dataset to be: a file or a span of it. A tuple, as there may be ten million.

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


class Plan(NamedTuple):
    """What a build will do. `hash` names clips and settings: the same hash means the same shards, byte for byte."""

    hash: str
    settings: dict[str, Any]
    shards: list[Shard]

    @property
    def num_clips(self) -> int:
        return sum(len(s.clips) for s in self.shards)


def make_plan(clips: Iterable[Clip], limits: ShardConfig, seed: int, settings: dict[str, Any]) -> Plan:
    """Deal clips to shards: sources in a seeded order, each whole in one shard where it fits.

    Args:
        settings: everything else that the shards' bytes depend on, as plain data; it goes into the hash.

    Raises:
        DataError: there is no clip, or a video id occurs twice in a split.
    """
    ordered = sorted(clips, key=lambda c: (c.split, _draw(seed, c.source_id), c.source_id, c.video_id))
    if not ordered:
        raise DataError("the source has no clips: nothing to build")
    for first, second in pairwise(ordered):
        if (first.split, first.video_id) == (second.split, second.video_id):
            raise DataError(f"video id {first.video_id!r} occurs twice in split {first.split!r}: rename one")
    settings = {**settings, "shards": limits.model_dump(mode="json"), "seed": seed}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for clip in ordered:
        digest.update(json.dumps(clip, ensure_ascii=False).encode() + b"\n")
    return Plan(digest.hexdigest(), settings, list(_cut(ordered, limits)))


def _cut(ordered: list[Clip], limits: ShardConfig) -> Iterator[Shard]:
    for split, of_split in groupby(ordered, attrgetter("split")):
        number, clips, size = 0, list[Clip](), 0
        for _, of_source in groupby(of_split, attrgetter("source_id")):
            source = list(of_source)
            # A source that fits nowhere whole is cut; any other starts a new shard rather than being cut.
            total = sum(c.size or 0 for c in source)
            whole = len(source) <= limits.max_samples and total <= limits.max_bytes
            for part in [source] if whole else [[c] for c in source]:
                part_size = sum(c.size or 0 for c in part)
                is_full = len(clips) + len(part) > limits.max_samples or size + part_size > limits.max_bytes
                if clips and is_full:
                    yield Shard(split, number, clips)
                    number, clips, size = number + 1, [], 0
                clips.extend(part)
                size += part_size
        yield Shard(split, number, clips)


def _draw(seed: int, name: str) -> bytes:
    """A random key of a name: sorting by it is a shuffle that does not depend on the order of the input."""
    return hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
