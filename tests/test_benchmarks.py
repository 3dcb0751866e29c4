"""What the benchmarks make of annotations and of the times they measured."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.input import InputBenchConfig, drawn, summary, timed
from benchmarks.real_clips import family
from tests.entry import REPOSITORY
from training.data.decode import draws, frame_indices


def test_emoji_that_differ_in_the_person_only_are_one_family() -> None:
    assert family("man running") == family("woman running") == family("person running: medium skin tone")
    assert family("man running") != family("man walking")
    assert family("woman") == family("old man")
    assert family("couple with heart: man, man") == family("family: woman, girl")


def test_annotations_group_families_and_drawing_styles(tmp_path: Path) -> None:
    records = [
        {"file": "emoji/a/man_running.mp4", "label": "man running", "keywords": ["race", "run"]},
        {"file": "emoji/b/woman_running.mp4", "label": "woman running", "keywords": []},
        {"file": "emoji/a/dog.mp4", "label": "dog", "keywords": ["pet"]},
    ]
    (tmp_path / "emoji").mkdir()
    (tmp_path / "emoji/captions.json").write_text(json.dumps(records))
    command = [sys.executable, "-m", "benchmarks.real_clips", "emoji", str(tmp_path), str(tmp_path / "a.jsonl")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert "3 clips in 2 groups" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["captions"] for line in lines] == [["man running", "race, run"], ["woman running"], ["dog", "pet"]]
    assert lines[0]["group"] == lines[1]["group"] != lines[2]["group"]


def test_input_draws_what_training_draws() -> None:
    indices, random = drawn("a", 5, InputBenchConfig(frames=12))
    again = draws(0, 0, "a")
    assert indices == sorted(set(frame_indices(5, 12, 1, again))) == [0, 1, 2, 3, 4]
    assert random.random() == again.random()  # so the crop is the same, too


def test_input_times_every_clip_by_the_clock_and_the_cpu() -> None:
    rows: list[int] = []
    times = timed(rows.append, 3)
    assert rows == [0, 1, 2] and times.keys() == {"tasks", "cpu"}


def test_input_reports_the_sides_that_there_are() -> None:
    seconds = {"ours video": 4.0, "ours frames": 1.0, "decord": 3.0, "simplejpeg": 0.5}
    rows = [{side: {"tasks": 2 * k * s, "cpu": k * s} for side, s in seconds.items()} for k in (1.0, 2.0, 1.0)]
    lines = summary(rows, 100, {"video": 2e5, "frames": 5e5}, InputBenchConfig(clips_per_gpu=1000))
    assert lines[0].startswith("ours video: 12.500 (") and lines[0].endswith("clips/s by the clock")
    assert [line for line in lines if line.startswith("ours video / decord: 0.750")] and "opencv" not in str(lines)
    assert lines[-2:] == [
        "payload video: 40.0, and 200 MB/s of shards",
        "payload frames: 10.0, and 500 MB/s of shards",
    ]
