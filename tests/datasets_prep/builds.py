"""Sources and builds as tests start them, and what lies in a dataset's folder."""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common import config as configs
from common.errors import exit_with
from datasets_prep.build import Built, build
from datasets_prep.config import PRESETS, BuildConfig, ShardConfig
from datasets_prep.plan import Clip, make_plan
from datasets_prep.sources import SOURCES

Annotate = Callable[..., str]
Write = Callable[..., str]
Files = dict[str, tuple[int, bytes]]
GOOD = {"video": "small.mp4", "caption": "good", "split": "train"}  # a line of annotations


def load(preset: str, output: Path | str, *overrides: str) -> BuildConfig:
    return configs.load(BuildConfig, preset, [f"output={output}", *overrides], PRESETS)


def build_shapes(output: Path | str, shapes: Path, *overrides: str) -> Built:
    """7 shards: 28 training clips in four, 16 test clips in two, 6 of val in one."""
    numbers = ["source.num_pairs=14", "source.val_pairs=3", "source.test_pairs=8"]
    return build(load("tiny", output, f"source.videos={shapes}", *numbers, *overrides))


def build_custom(output: Path | str, annotations: str, videos: Path, *overrides: str) -> Built:
    source = [f"source.annotations={annotations}", f"source.videos={videos}", "video.short_side=64", "payload=video"]
    return build(load("custom", output, *source, *overrides))


def files(folder: Path) -> Files:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*.*")}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: data for name, (_, data) in files(folder).items()}


def run(module: object, *arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of an entry point."""
    monkeypatch.setattr(sys, "argv", ["", *arguments])
    with pytest.raises(SystemExit) as caught:
        exit_with(module.main)  # type: ignore[attr-defined]
    assert isinstance(caught.value.code, int)
    return caught.value.code


def read(config: Any) -> list[Clip]:
    """The clips, as a build takes them: they make a plan."""
    clips = list(SOURCES[config.name](config))
    make_plan(clips, ShardConfig(), 0, {})
    return clips


def by_id(config: Any) -> dict[str, Clip]:
    return {clip.video_id: clip for clip in read(config)}


def counts(clips: list[Clip]) -> dict[str, int]:
    return dict(Counter(clip.split for clip in clips))


def captions(clips: list[Clip]) -> dict[str, int]:
    total = Counter[str]()
    for clip in clips:
        total[clip.split] += len(clip.captions)
    return dict(total)


def in_val(source_id: str, share: float = 0.05) -> bool:
    """The rule as docs/datasets.md has it."""
    return int.from_bytes(hashlib.sha256(source_id.encode()).digest()[:8], "big") < share * 2**64
