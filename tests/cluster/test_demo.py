"""The main job from end to end, as `make demo` runs it, on a smaller set and with few steps."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tests import entry

SMALL = """
from pathlib import Path
import sys
from cluster.demo import demo
folder = Path(sys.argv[1])
demo(
    folder / "demo",
    build=["source.num_pairs=16", "source.val_pairs=4", "source.test_pairs=4", "shards.max_samples=16"],
    train=["optim.steps=4", "optim.batch_size=8", "eval.every=4", "checkpoint.every=4", "tracking.log_every=1",
           "workers.loader_workers=0", f"tracking.uri=sqlite:///{folder}/mlflow.db"],
)
"""


def test_the_whole_way(tmp_path: Path) -> None:
    """Videos, shards on S3, `ray job submit` of the training, evaluation, vectors, index, ranked videos."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "old").touch()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
    done = subprocess.run(
        [sys.executable, "-c", SMALL, str(tmp_path)], cwd=entry.REPOSITORY, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "demo/result.json").read_text())
    assert set(result) == {
        *("r1", "r5", "r10", "mdr", "mnr", "order", "chance_r1", "ceiling_order", "num_videos", "stages_s"),
        *("mlflow_run", "dataset", "run", "index", "contact_sheet"),
    }
    assert (result["num_videos"], result["chance_r1"], result["ceiling_order"]) == (8, 12.5, 0.5)
    assert 0 <= result["r1"] <= result["r5"] <= result["r10"] <= 100 and 0 <= result["order"] <= 1
    assert list(result["stages_s"]) == ["start", "build", "train", "embed", "index", "search"]
    assert not (tmp_path / "demo/old").exists()

    sheet = Path(result["contact_sheet"]).read_text()
    assert "a red square moves from left to right" in sheet
    assert sheet.count("<img") >= 8
    for shown in ("text → video on 8 held-out videos", "order-blind ceiling", "MLflow run:"):
        assert shown in done.stdout
    assert re.search(r"(\d+) of \1 shards", done.stdout)
    assert re.search(r"train runs, \d+s so far", done.stdout)  # a line every few seconds, also before the first step
    assert re.search(r"SUCCEEDED|succeeded", (tmp_path / "demo/logs/train.log").read_text())
    secret = (tmp_path / "demo/ray/ray_token").read_text()
    logs = "".join(path.read_text() for path in (tmp_path / "demo/logs").iterdir())
    assert secret not in logs + done.stdout + done.stderr
    assert running_in(tmp_path / "demo") == []


def running_in(folder: Path) -> list[str]:
    """Command lines of processes that were started with this folder in their environment or arguments."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            about = (process / "environ").read_bytes() + (process / "cmdline").read_bytes()
            if str(folder).encode() in about:
                found.append((process / "cmdline").read_text())
        except OSError:  # it ended, or is another user's
            continue
    return found
