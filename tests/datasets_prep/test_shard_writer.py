"""How a shard reads its sources: each once, the next one while the clips of one are made."""

import threading
from pathlib import Path

import pytest

from datasets_prep import shard_writer
from datasets_prep.plan import Clip


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
