import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from datasets_prep.config import ShardConfig
from datasets_prep.plan import Clip, Plan, Shard, make_plan


def clip(i: int, source: str | None = None, split: str = "train", size: int | None = 10) -> Clip:
    return Clip(split, f"v{i}", source or f"s{i}", ("a caption",), f"v{i}.mp4", None, None, size)


def plan(clips: list[Clip], max_samples: int = 10, max_bytes: int = 1000, seed: int = 0) -> Plan:
    return make_plan(clips, ShardConfig(max_samples=max_samples, max_bytes=max_bytes), seed, {"video": {"crf": 23}})


def shards_of(made: Plan) -> list[Shard]:
    return [made.shard(cut) for cut in made.cuts]


@given(
    sources=st.lists(st.integers(1, 7), min_size=1, max_size=30),
    max_samples=st.integers(1, 8),
    max_bytes=st.integers(1, 120),
    seed=st.integers(0, 3),
)
def test_every_clip_once_within_limits_and_sources_whole(
    sources: list[int], max_samples: int, max_bytes: int, seed: int
) -> None:
    names = [f"s{n}" for n, count in enumerate(sources) for _ in range(count)]
    clips = [clip(i, name) for i, name in enumerate(names)]
    made = shards_of(plan(clips, max_samples, max_bytes, seed))
    assert sorted(c for s in made for c in s.clips) == sorted(clips)
    assert [s.number for s in made] == list(range(len(made)))
    where: dict[str, set[int]] = {}
    for shard in made:
        size = sum(c.size or 0 for c in shard.clips)
        assert 0 < len(shard.clips) <= max_samples
        assert size <= max_bytes or len(shard.clips) == 1
        for c in shard.clips:
            where.setdefault(c.source_id, set()).add(shard.number)
    for name, shard_numbers in where.items():
        count = names.count(name)
        assert len(shard_numbers) == 1 or count > max_samples or 10 * count > max_bytes


def test_input_order_does_not_matter_but_the_seed_does() -> None:
    clips = [clip(i, f"s{i // 2}", "train" if i % 4 < 2 else "test") for i in range(100)]
    shuffled = clips[:]
    random.Random(0).shuffle(shuffled)
    first, same, other = plan(clips), plan(shuffled), plan(clips, seed=1)
    assert (first.hash, shards_of(first)) == (same.hash, shards_of(same))
    train, test = (
        [[c.source_id for s in shards_of(made) for c in s.clips if c.split == split] for made in (first, other)]
        for split in ("train", "test")
    )
    assert train[0] != train[1] and sorted(train[0]) == sorted(train[1])
    assert test[0] == test[1] == sorted(test[0])  # only the splits of `shards.shuffle` are shuffled


def test_samples_of_one_size_fill_a_shard_by_that_size() -> None:
    """JPEGs take as much of a long video as of a short one; a file that is missing or empty takes nothing."""
    clips = [clip(i, size=size) for i, size in enumerate([10_000, 1, 500, 70, None, 0])]
    made = make_plan(clips, ShardConfig(max_bytes=200), 0, {}, sample_bytes=100)
    assert [sum(100 for c in s.clips if c.size) for s in shards_of(made)] == [200, 200]
    assert len({made.hash, make_plan(clips, ShardConfig(max_bytes=200), 0, {}).hash}) == 2


def test_the_hash_names_all_that_changes_the_bytes() -> None:
    clips = [clip(i) for i in range(9)]
    hashes = {
        plan(clips).hash,
        plan(clips[1:]).hash,
        plan([*clips[1:], clips[0]._replace(captions=("another",))]).hash,
        plan([*clips[1:], clips[0]._replace(size=11)]).hash,
        plan(clips, max_samples=4).hash,
        plan(clips, seed=1).hash,
        make_plan(clips, ShardConfig(max_samples=10, max_bytes=1000), 0, {"video": {"crf": 24}}).hash,
    }
    assert len(hashes) == 7


def test_splits_have_shards_of_their_own() -> None:
    made = plan([clip(i, split="train" if i else "test") for i in range(30)])
    assert [cut.name for cut in made.cuts] == ["test/shard-000000.tar"] + [f"train/shard-{i:06d}.tar" for i in range(3)]


def test_refuses_what_can_not_be_a_dataset() -> None:
    with pytest.raises(DataError, match="no clips"):
        plan([])
    with pytest.raises(DataError, match="'v1' occurs twice in split 'train'"):
        plan([clip(1), clip(2), clip(1, source="other")])
    assert plan([clip(1), clip(1, split="test")])


def test_many_batches_are_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    clips = [clip(i, f"s{i // 3}") for i in range(100)]
    whole = (plan(clips).hash, shards_of(plan(clips)))
    monkeypatch.setattr("datasets_prep.plan.ROWS_PER_BATCH", 7)
    assert (plan(clips).hash, shards_of(plan(clips))) == whole


def test_clips_come_back_as_they_were() -> None:
    there = [
        Clip("train", "a", "long", ("one", "two"), "x/long.mp4", 1.25, 3600.125, 5),
        Clip("train", "b", "b", (), "b", None, None, None),
    ]
    assert sorted(c for s in shards_of(plan(there)) for c in s.clips) == there


def test_names_that_are_no_text_become_clips_without_a_file() -> None:
    """JSON can say half a surrogate pair, and a name in no encoding becomes one: neither can be written as UTF-8."""
    (shard,) = shards_of(plan([clip(1)._replace(video="a\udcff.mp4", video_id="a\udcff.mp4")]))
    assert shard.clips[0][1:] == ("a\\udcff.mp4", "s1", ("a caption",), "a\\udcff.mp4", None, None, None)
