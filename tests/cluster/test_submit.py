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

from cluster import jobs, package, submit
from cluster.config import COMMANDS, OF_A_RUN, OF_URLS
from cluster.local import RayCluster
from common import config as configs
from common.errors import ConfigError, ProjectError, RunError
from tests import entry
from training.config import PRESETS, TrainConfig

TRACKED = ["training/train.py", "training/presets/tiny.yaml", "datasets_prep/build.py", "tuning/study.py"]
TRACKED += ["training/evaluate.py", "training/caption.py", "training/export.py"]
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
    monkeypatch.setattr(package, "REPOSITORY", root)
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
        (["python", "-m", "tuning.study", "tiny", "base=prompt_switch"], ["preset prompt_switch.yaml", "not tracked"]),
        (["python", "-m", "training.train", "./mine.yaml"], ["mine.yaml"]),
        (["python", "-m", "tuning.study", "tiny", 'space={"optim.lrr": {"choice": [1]}}'], ["optim.lrr"]),
        (["python", "-m", "training.evaluate", "runs/first", "data.test=test"], ["runs/first is relative"]),
        (["python", "-m", "training.caption", "/no/such/run"], ["/no/such/run/config.yaml does not exist"]),
        (["python", "-m", "training.evaluate", "data.test=test"], ["data.test=test", "does not exist"]),
        (["python", "-m", "training.export", "s3://runs/first", "output=exported"], ["exported is relative"]),
    ],
)
def test_a_mistake_is_refused_before_anything_travels(command: Sequence[str], words: Sequence[str]) -> None:
    with pytest.raises(ProjectError) as refused:
        package.check(command, TRACKED)
    for word in words:
        assert word in str(refused.value)


def test_the_keys_of_what_takes_a_run_are_checked_by_the_run(tmp_path: Path) -> None:
    """Each run by its own configuration: the second has no captions."""
    with_captions = configs.load(TrainConfig, "tiny", [], PRESETS)
    without = configs.apply(with_captions, {"model.captioner": None, "losses.caption": 0})
    for name, config in {"first": with_captions, "second": without}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(configs.dump(config))
    runs = [str(tmp_path / name) for name in ("first", "second")]
    evaluate = ["python", "-m", "training.evaluate", *runs]
    assert list(package.check([*evaluate, "eval.views=2"], TRACKED).frozen) == [*evaluate, "eval.views=2"]
    for command, word in (
        ([*evaluate, "eval.vews=2"], "eval.views"),
        ([*evaluate, "report=here"], "report=here is relative"),
        (["python", "-m", "training.caption", *runs], "run second was trained with model.captioner=null"),
    ):
        with pytest.raises(ConfigError, match=word):
            package.check(command, TRACKED)


def test_a_run_that_this_machine_may_not_read_is_checked_on_the_cluster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Seen to fail where that is an error: the nodes have a role, the client often has none."""
    (tmp_path / "config.yaml").mkdir()  # to read a folder is no better than an answer 403
    command = ["python", "-m", "training.evaluate", str(tmp_path), "eval.vews=2"]
    assert list(package.check(command, TRACKED).frozen) == command
    assert "not checked here" in caplog.text


def test_a_tracked_file_is_not_overwritten_by_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"job\.yaml at the top of the repository"):
        package.check(TRAIN, [*TRACKED, "job.yaml"])


@pytest.mark.parametrize("words", [["python", "-m", "timeit", "pass"], ["nvidia-smi"]])
def test_a_strange_command_passes_as_it_is(words: list[str]) -> None:
    assert list(package.check(words, TRACKED).frozen) == words


def test_what_was_checked_is_what_runs(repository: Path, tmp_path: Path) -> None:
    """Seen to fail where the command goes as it was given: a preset changed since would be another run."""
    command = package.check([*TRAIN, "optim.lr=1e-5"], TRACKED)
    (tmp_path / "sent").mkdir()
    package.pack(command, ["job.py"], tmp_path / "sent")
    assert list(command.frozen) == ["python", "-m", "training.train", "job.yaml"]
    assert sorted(p.name for p in (tmp_path / "sent").iterdir()) == ["job.py", "job.yaml"]
    assert configs.load(COMMANDS["training.train"][0], str(tmp_path / "sent" / "job.yaml")) == command.config


def test_named_files_travel_and_too_much_does_not(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert package.named_files(["secret.env"]) == ["secret.env"]
    with pytest.raises(ConfigError, match=r"--with \.\./x: there is no such file"):
        package.named_files(["../x"])
    (repository / "large.bin").write_bytes(bytes(1000))
    monkeypatch.setattr(package, "MAX_BYTES", 1000)
    command = package.check(["nvidia-smi"], [])
    with pytest.raises(ConfigError, match=r"the largest: large\.bin \(1,000 bytes\), kept\.dat"):
        package.pack(command, ["job.py", "kept.dat", "large.bin"], tmp_path / "sent")


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "api_key"])
def test_a_secret_is_not_passed_where_the_dashboard_shows_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "x")
    with pytest.raises(ConfigError, match=f"--env {name} looks like a secret"):
        submit.submit(["nvidia-smi"], "http://127.0.0.1:9", env=[name])


def test_every_command_that_is_checked_exists_and_has_presets() -> None:
    for module, (schema, presets, paths) in COMMANDS.items():
        assert (entry.REPOSITORY / f"{module.replace('.', '/')}.py").is_file()
        assert configs.preset_names(presets), module
        assert set(paths) <= set(configs.keys(schema))
    for module, (schema, paths) in OF_A_RUN.items():
        assert (entry.REPOSITORY / f"{module.replace('.', '/')}.py").is_file()
        assert set(paths) <= set(configs.keys(schema))
    assert all((entry.REPOSITORY / f"{module.replace('.', '/')}.py").is_file() for module in OF_URLS)


def test_exactly_the_tracked_files_travel(repository: Path) -> None:
    assert sorted(package.tracked_files()) == [".gitignore", "job.py", "kept.dat"]


def test_a_folder_without_git_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "REPOSITORY", tmp_path)
    with pytest.raises(ConfigError, match="git checkout"):
        package.tracked_files()


def test_no_address_and_no_server_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="RAY_API_SERVER_ADDRESS"):
        jobs.connect()
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    with pytest.raises(RunError, match=r"http://127\.0\.0\.1:9"):
        jobs.connect()


def test_the_command_line_refuses_without_a_traceback() -> None:
    unreachable = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
    entry.assert_refused(entry.run("cluster.submit", "--", *TRAIN, "optim.lrr=1", env=unreachable), "optim.lrr")
    entry.assert_refused(entry.run("cluster.submit"), "no command given")
    entry.assert_refused(entry.run("cluster.submit", "lisst"), "'lisst' is not understood")
    entry.assert_refused(entry.run("cluster.submit", "stop"), "stop takes one job")
    assert entry.run("cluster.submit", "--help").code == 0


def test_uncommitted_changes_travel_and_success_is_told(
    ray_local: RayCluster, repository: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (repository / "job.py").write_text(
        "import os, sys\n"
        "print('files', sorted(f for f in os.listdir() if f != '__pycache__'), sys.argv[1:])\n"
        "print('credentials', 'AWS_SECRET_ACCESS_KEY' in os.environ)\n"
    )
    jobs.follow(submit.submit(["python", "job.py", "a b", 'c={"d": 1}']))
    out = capfd.readouterr().out
    assert """files ['.gitignore', 'job.py', 'kept.dat'] ['a b', 'c={"d": 1}']""" in out
    assert "credentials True" in out
    assert out.count("credentials") == 1  # the log is shown once


def test_a_failed_and_a_stopped_job_are_no_success(ray_local: RayCluster, repository: Path) -> None:
    (repository / "job.py").write_text("import sys, time\ntime.sleep(float(sys.argv[1]))\nsys.exit(7)\n")
    failed = submit.submit(["python", "job.py", "0"], job="mine")
    assert failed == "mine"
    with pytest.raises(RunError, match=r"FAILED.*exit code 7"):
        jobs.follow(failed)
    with pytest.raises(RunError, match="refused the job"):
        submit.submit(["python", "job.py", "0"], job="mine")
    with pytest.raises(RunError, match="there is no job yours"):
        jobs.follow("yours")
    job = submit.submit(["python", "job.py", "600"])
    stopper = threading.Thread(target=_stop_when_running, args=(job,))
    stopper.start()
    with pytest.raises(RunError, match="STOPPED"):
        jobs.follow(job)
    stopper.join()


def _stop_when_running(job: str) -> None:
    client = jobs.connect()
    while client.get_job_status(job) == "PENDING":
        time.sleep(0.2)
    client.stop_job(job)


def test_a_job_is_listed_and_resumed_with_the_code_as_it_is_now(
    ray_local: RayCluster, repository: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLOUR", "red")
    (repository / "job.py").write_text("raise SystemExit(3)\n")
    first = submit.submit(["python", "job.py"], env=["COLOUR"])
    with pytest.raises(RunError, match="FAILED"):
        jobs.follow(first)
    (repository / "job.py").write_text("import os\nprint('colour', os.environ['COLOUR'])\n")
    second = submit.resume(first)
    jobs.follow(second)
    assert second != first and "colour red" in capfd.readouterr().out
    newest, older, *_ = jobs.listing().splitlines()
    assert newest.startswith(second) and "SUCCEEDED" in newest and older.startswith(first) and "FAILED" in older


def test_a_server_that_does_not_answer_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to fail without the second question: a driver's network is not the job's."""
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    # A server that is away is named with what happens to hold a 404: seen to fail where that alone is looked for.
    away = OSError("Max retries exceeded with url: /api/jobs/train-20261128-040404: <HTTPConnection at 0x7f404>")
    answers = iter([away, RuntimeError("502"), "SUCCEEDED"])

    def question() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    assert jobs.asked(question, "mine") == "SUCCEEDED"
    monkeypatch.setattr(jobs, "PATIENCE_S", 0.0)
    answers = iter([OSError("connection refused")])
    with pytest.raises(RunError, match="lost sight of job mine"):
        jobs.asked(question, "mine")


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
