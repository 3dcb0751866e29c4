"""What the benchmarks make of annotations."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.real_clips import family
from tests.entry import REPOSITORY


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
