"""The payload `frames`: its shards are as exact as those of videos."""

from pathlib import Path

from cluster.local import RayCluster
from tests.datasets_prep.builds import build_shapes, contents


def test_jpegs_are_the_same_bytes_for_any_number_of_workers_and_after_a_repair(
    shapes: Path, tmp_path: Path, ray_local: RayCluster
) -> None:
    for name, workers in (("one", 1), ("two", 2)):
        build_shapes(tmp_path / name, shapes, "payload=frames", "frames.segments=2", f"workers={workers}")
    for lost in ("train/shard-000001.json", "dataset.json"):
        (tmp_path / "two" / lost).unlink()
    (tmp_path / "two/train/shard-000001.tar").write_bytes(b"cut short")
    build_shapes(tmp_path / "two", shapes, "payload=frames", "frames.segments=2")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
