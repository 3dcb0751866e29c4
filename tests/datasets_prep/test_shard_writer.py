"""How a shard is written: each source read once and ahead, and what a full disk means."""

import threading
from pathlib import Path

import pytest

from common.errors import NoSpaceError
from datasets_prep import shard_writer
from datasets_prep.config import FramesConfig, VideoConfig
from datasets_prep.plan import Clip, Shard
from datasets_prep.shard_writer import Recipe, write_shard


def test_a_source_is_read_once_for_its_clips_and_ahead_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to fail when the next is fetched only after the clips, and when each clip fetches its own."""
    fetched: list[str] = []
    begun = {name: threading.Event() for name in "abc"}

    def download(url: str, path: Path) -> None:
        name = url[-1]
        fetched.append(url)
        path.write_text(name)
        begun[name].set()

    monkeypatch.setattr(shard_writer.storage, "download", download)
    names = ["a", "a", "a", "b", None, "c", "c"]  # None: there is no such file
    clips = [Clip("train", f"{i}", "s", ("x",), n or "none", None, None, n and 1) for i, n in enumerate(names)]
    most = 0
    for clip, path in shard_writer._sources(clips, "s3://videos", tmp_path):
        assert (path and path.read_text()) == (None if clip.video == "none" else clip.video)
        following = {"a": "b", "none": "c"}.get(clip.video)
        if following:
            assert begun[following].wait(20), "the next source is not fetched while this one is in use"
        most = max(most, len(list(tmp_path.iterdir())))
    assert fetched == ["s3://videos/a", "s3://videos/b", "s3://videos/c"]
    assert most <= 2 and not list(tmp_path.iterdir())  # the disk holds two at a time, and none at the end


def test_a_full_disk_is_the_nodes_fault_and_in_one_sentence(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is tried again and rejects no clip. Seen to fail, with an OSError, without `_with_room`."""
    real = shard_writer.webdataset.TarWriter
    monkeypatch.setattr(shard_writer.webdataset, "TarWriter", lambda _, **options: real("/dev/full", **options))
    clip = Clip("train", "small.mp4", "s", ("x",), "small.mp4", None, None, 1)
    recipe = Recipe(str(videos), "video", VideoConfig(), FramesConfig())
    with pytest.raises(NoSpaceError, match=r"no room for a shard in .*: make room and run again to go on"):
        write_shard(Shard("train", 0, [clip]), "hash", str(tmp_path / "out"), recipe)
    assert not (tmp_path / "out").exists()
