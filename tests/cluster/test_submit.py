"""cluster.submit: mistakes are refused here, tracked files travel, the exit code tells how the job ended."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from cluster import submit
from cluster.config import COMMANDS
from cluster.local import RayCluster
from common import config as configs
from common.errors import ConfigError, ProjectError, RunError
from tests import entry

TRACKED = ["training/train.py", "training/presets/tiny.yaml", "datasets_prep/build.py", "tuning/study.py"]
TRAIN = ["python", "-m", "training.train", "tiny", "data.dataset=s3://datasets/x", "run.storage=s3://runs"]
TRAIN.append("tracking.uri=http://mlflow:5000")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small git repository in the place of this one: a tracked, an ignored-but-tracked and an untracked file."""
    root = tmp_path / "repository"
    root.mkdir()
    (root / ".gitignore").write_text("*.dat\n")
    (root / "job.py").write_text("print('committed')\n")
    (root / "kept.dat").write_text("tracked, though ignored")
    (root / "gone.py").write_text("")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "-f", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], cwd=root, check=True)
    (root / "gone.py").unlink()
    (root / "secret.env").write_text("untracked")
    monkeypatch.setattr(submit, "REPOSITORY", root)
    return root


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([*TRAIN, "optim.lrr=1"], ["optim.lrr", "optim.lr"]),
        ([*TRAIN, "optim.lr=fast"], ["optim.lr", "fast"]),
        ([*TRAIN, "optim.lr"], ["optim.lr", "key.path=value"]),
        ([*TRAIN, "run.storage=runs"], ["run.storage=runs is relative", "full path or a URL"]),
        ([*TRAIN, "tracking.uri=sqlite:///mlflow.db"], ["tracking.uri=sqlite:///mlflow.db is relative"]),
        (["python3.11", "-m", "training.train", "tyni"], ["tyni", "tiny"]),
        (["python", "-m", "training.train"], ["no preset"]),
        (["python", "-m", "training.trian", "tiny"], ["training.trian", "training.train"]),
        (["python", "-m", "datasets_prep.build", "tiny", "output=s3://x"], ["preset tiny.yaml", "not tracked"]),
        (["python", "-m", "training.train", "./mine.yaml"], ["mine.yaml"]),
        (["python", "-m", "tuning.study", "tiny", 'space={"optim.lrr": {"choice": [1]}}'], ["optim.lrr"]),
    ],
)
def test_a_mistake_is_refused_before_anything_travels(command: Sequence[str], words: Sequence[str]) -> None:
    with pytest.raises(ProjectError) as refused:
        submit.check(command, TRACKED)
    for word in words:
        assert word in str(refused.value)


def test_a_right_command_and_a_strange_one_pass() -> None:
    submit.check(TRAIN, TRACKED)
    submit.check(["python", "-m", "timeit", "pass"], TRACKED)
    submit.check(["nvidia-smi"], TRACKED)


def test_every_command_that_is_checked_exists_and_has_presets() -> None:
    for module, (schema, presets, paths) in COMMANDS.items():
        assert (entry.REPOSITORY / f"{module.replace('.', '/')}.py").is_file()
        assert configs.preset_names(presets), module
        assert set(paths) <= set(configs.keys(schema))


def test_exactly_the_tracked_files_travel(repository: Path) -> None:
    assert sorted(submit.tracked_files()) == [".gitignore", "job.py", "kept.dat"]


def test_a_folder_without_git_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "REPOSITORY", tmp_path)
    with pytest.raises(ConfigError, match="git checkout"):
        submit.tracked_files()


def test_no_address_and_no_server_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="RAY_API_SERVER_ADDRESS"):
        submit.connect()
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(RunError, match=r"http://127\.0\.0\.1:9"):
        submit.connect()


def test_the_command_line_refuses_without_a_traceback() -> None:
    unreachable = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
    entry.assert_refused(entry.run("cluster.submit", "--", *TRAIN, "optim.lrr=1", env=unreachable), "optim.lrr")
    entry.assert_refused(entry.run("cluster.submit"), "no command given")
    assert entry.run("cluster.submit", "--help").code == 0


def test_uncommitted_changes_travel_and_success_is_told(
    ray_local: RayCluster, repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (repository / "job.py").write_text(
        "import os, sys\n"
        "print('files', sorted(f for f in os.listdir() if f != '__pycache__'), sys.argv[1:])\n"
        "print('credentials', 'AWS_SECRET_ACCESS_KEY' in os.environ)\n"
    )
    submit.follow(submit.submit(["python", "job.py", "a b", 'c={"d": 1}']))
    out = capfd.readouterr().out
    assert """files ['.gitignore', 'job.py', 'kept.dat'] ['a b', 'c={"d": 1}']""" in out
    assert "credentials True" in out
    assert out.count("credentials") == 1  # the log is shown once


def test_a_failed_and_a_stopped_job_are_no_success(ray_local: RayCluster, repository: Path) -> None:
    (repository / "job.py").write_text("import sys, time\ntime.sleep(float(sys.argv[1]))\nsys.exit(7)\n")
    with pytest.raises(RunError, match=r"FAILED.*exit code 7"):
        submit.follow(submit.submit(["python", "job.py", "0"]))
    job = submit.submit(["python", "job.py", "600"])
    stopper = threading.Thread(target=_stop_when_running, args=(job,))
    stopper.start()
    with pytest.raises(RunError, match="STOPPED"):
        submit.follow(job)
    stopper.join()


def _stop_when_running(job: str) -> None:
    client = submit.connect()
    while client.get_job_status(job) == "PENDING":
        time.sleep(0.2)
    client.stop_job(job)


def test_plain_ray_job_submit_works(ray_local: RayCluster, tmp_path: Path) -> None:
    """Ray's own command, with no part of ours between: the tree as `--working-dir`, a module of it as entry point."""
    shutil.copytree(entry.REPOSITORY / "common", tmp_path / "common", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "trivial.py").write_text(
        "import logging\n"
        "from common import errors, logs\n"
        "def main():\n"
        "    logs.setup()\n"
        "    logging.getLogger(__name__).info('a line')\n"
        "    raise errors.DataError('the content is wrong')\n"
        "errors.exit_with(main)\n"
    )
    ray = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--working-dir", str(tmp_path), "--"]
    done = subprocess.run([*ray, "python", "-m", "trivial"], env=dict(os.environ), capture_output=True, text=True)
    assert done.returncode != 0
    assert "error: the content is wrong" in done.stdout + done.stderr
    assert 'File "' not in done.stdout
    assert re.search(r"raysubmit_\w+ .*INFO a line", done.stdout)
