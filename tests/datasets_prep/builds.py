"""Builds as tests start them, and what lies in a dataset's folder."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from common import config as configs
from common.errors import exit_with
from datasets_prep.build import Built, build
from datasets_prep.config import PRESETS, BuildConfig

Annotate = Callable[..., str]
Files = dict[str, tuple[int, bytes]]


def load(preset: str, output: Path | str, *overrides: str) -> BuildConfig:
    return configs.load(BuildConfig, preset, [f"output={output}", *overrides], PRESETS)


def build_shapes(output: Path | str, shapes: Path, *overrides: str) -> Built:
    """7 shards: 28 training clips in four, 16 test clips in two, 6 of val in one."""
    numbers = ["source.num_pairs=14", "source.val_pairs=3", "source.test_pairs=8"]
    return build(load("tiny", output, f"source.videos={shapes}", *numbers, *overrides))


def build_custom(output: Path | str, annotations: str, videos: Path, *overrides: str) -> Built:
    source = [f"source.annotations={annotations}", f"source.videos={videos}", "video.short_side=64"]
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
