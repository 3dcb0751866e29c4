"""cluster/slurm.sh on one machine, with stand-ins for srun and scontrol: Slurm needs daemons and a host's name."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import processes
from tests.entry import REPOSITORY

SCRIPT = REPOSITORY / "cluster" / "slurm.sh"
SRUN = '#!/bin/bash\nwhile [[ "$1" == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = '#!/bin/bash\nif [ "$1" = show ]; then echo localhost; else echo "$@" >>"$SCONTROL_LOG"; fi\n'
IP = "#!/bin/bash\necho 127.0.0.1\n"


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The variables of a job of one node, its Ray ended afterwards."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("hostname", IP)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    mark = os.urandom(8).hex()
    yield {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        processes.MARK: mark,
        "SPT_NOENV": "1",
        "PATH": f"{tmp_path / 'bin'}:{processes.path()}",
        "SLURM_JOB_ID": str(int.from_bytes(os.urandom(2)) + os.getpid()),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_CPUS_PER_TASK": "1",
        "RAY_STATE_DIR": str(tmp_path / "state"),
        "GRACE_S": "5",
        "SCONTROL_LOG": str(tmp_path / "scontrol.log"),
    }
    processes.end(mark)


def test_shellcheck_finds_nothing():
    for script in (SCRIPT, SCRIPT.with_name("install.sh")):
        done = subprocess.run([Path(sys.executable).with_name("shellcheck"), script], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_no_command_is_told():
    done = subprocess.run(["bash", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2 and "no command given" in done.stderr


def test_a_command_runs_on_the_jobs_ray_and_its_exit_code_is_the_jobs(slurm: dict[str, str], tmp_path: Path):
    code = "import ray; ray.init(); print('cpus', ray.cluster_resources()['CPU']); raise SystemExit(7)"
    done = subprocess.run(
        ["bash", SCRIPT, "python", "-c", code], env=slurm, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 7, done.stdout + done.stderr
    assert "cpus 1.0" in done.stdout
    (token,) = (tmp_path / "state").rglob("token")
    assert token.stat().st_mode & 0o077 == 0 and len(token.read_text().strip()) == 64


@pytest.mark.slow
def test_a_job_whose_time_ends_is_ended_and_queued_again(slurm: dict[str, str], tmp_path: Path):
    """Seen to fail without the trap of USR1: Slurm then kills the job, and nobody queues it again."""
    command = [
        "bash",
        str(SCRIPT),
        "python",
        "-c",
        f"open({str(tmp_path / 'began')!r}, 'w'); import time; time.sleep(600)",
    ]
    job = subprocess.Popen(command, env=slurm, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 200
    while not (tmp_path / "began").exists():
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.5)
    job.send_signal(subprocess.signal.SIGUSR1)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0 and "drain" in output
    assert (tmp_path / "scontrol.log").read_text().split() == ["requeue", slurm["SLURM_JOB_ID"]]
