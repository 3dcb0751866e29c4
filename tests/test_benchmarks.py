"""What the benchmarks make of annotations and of the times they measured."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, loglog, tuning
from benchmarks.input import InputBenchConfig, drawn, summary, timed
from benchmarks.real_clips import family
from benchmarks.saved_bytes import saved_bytes
from common import config as configs
from common.errors import ConfigError
from tests.entry import REPOSITORY, run
from training.data.decode import draws, frame_indices
from tuning.config import STUDIES, StudyConfig
from tuning.records import Record, Status
from tuning.space import resolve


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


def test_gpu_runs_at_a_toy_size(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["clips=4", "most_clips=8", "frames=6", "words=8", "rounds=1", "steps=1", "peak_tflops=1"]
    rows = 'options=["fp32","bf16+checkpointing+chunks"]'
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", 'backbones=["tiny"]', rows, *sizes])
    assert gpu.main() == 0
    _, operations, _, _, *table, first, second, third = capsys.readouterr().out.splitlines()
    # Forward and backward, two for each multiply-add: 6 frames, 4 blocks, 17 image tokens and 6 prompts of width 64.
    blocks = 3 * 2 * 6 * 4 * 23 * (12 * 64**2 + 2 * 23 * 64)
    assert (
        1 < float(operations.removeprefix("tiny: ").split()[0]) * 1e9 / blocks < 1.3
    )  # captions and heads beside them
    cells = [row.strip("| ").split(" | ") for row in table]
    assert [(c[1], c[2]) for c in cells] == [
        ("fp32", "4"),
        ("bf16+checkpointing+chunks", "4"),
        ("bf16", "8"),  # the largest that was tried
        ("bf16, chunk_size=8", "32"),
    ]
    for _, _, clips, ms, rate, tflops, mfu, *_ in cells:
        assert float(rate) == pytest.approx(1e3 * int(clips) / float(ms), rel=0.05)
        assert float(mfu.rstrip("%")) == pytest.approx(100 * float(tflops), abs=0.06)
    shares = [int(kernel.split("%")[0]) for kernel in (first, second, third)]
    assert 100 >= shares[0] >= shares[1] >= shares[2] > 0
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", 'options=["bf17"]'])
    with pytest.raises(ConfigError, match="bf17 is none of fp32, bf16"):
        gpu.main()


def test_gpu_goes_on_where_a_batch_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to fail where the search takes the last batch that was tried."""

    def measured(config: gpu.GpuBenchConfig, clips: int, device: object) -> gpu.Row:
        if clips > 100:
            raise torch.OutOfMemoryError
        return gpu.Row(1.0, None, None)

    monkeypatch.setattr(gpu, "step_of", lambda config, backbone, options, clips, chunk_size, device: clips)
    monkeypatch.setattr(gpu, "measured", measured)
    cpu = torch.device("cpu")
    assert gpu.largest(gpu.GpuBenchConfig(clips=16), "tiny", cpu) == 64
    assert gpu.largest(gpu.GpuBenchConfig(clips=128), "tiny", cpu) is None
    assert "does not fit" in gpu.line(gpu.GpuBenchConfig(), "tiny", "bf16", 128, None, 1.0, "CPU")


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


def test_saved_bytes_are_those_that_graphs_hold() -> None:
    """By hand. Seen to fail counting a storage once for each holder, parameters too, and all that was ever saved."""
    weight = torch.nn.Linear(4, 4, bias=False)
    x = torch.randn(8, 4, requires_grad=True)  # 128 bytes

    def act() -> None:
        y = weight(x).exp()  # keeps x, and its result
        (y.sin() + y.cos()).sum().backward()  # both keep y, which is kept already

    def twice() -> None:
        act()
        act()

    assert saved_bytes(weight, act) == saved_bytes(weight, twice) == 256


@pytest.mark.slow
def test_costs_of_methods_at_toy_size(tmp_path: Path) -> None:
    """By hand, on `tiny`: 64 floats of a video, or keys and values of 6 frames; no room for 3 MB of 1,000 videos."""
    toy = ["backbone=tiny", "frames=6", "sizes=[50,100,1000]", "max_gib=0.0005", "rounds=2", f"folder={tmp_path}"]
    command = ["benchmarks.retrieval_cost", 'methods=["prompt_switch","vop","xpool"]', *toy]
    done = run(*command)
    assert done.code == 0, done.err
    search, methods = (
        {name.strip("| "): cells for name, *cells in (line.split(" | ") for line in table.splitlines())}
        for table in done.out[done.out.index("| a query over") :].split("\n\n")
    )
    assert [cell.startswith("≈") for cell in search["xpool"]] == [False, False, True]
    assert all("×)" in cell and "≈" not in cell for cell in search["one vector, FAISS"])
    assert methods["prompt_switch"][1] == "0.25 KiB" and methods["xpool"][1] == "3 KiB (12 ×)"
    # 8 prompts of width 64 in 4 layers of images and 2 of text; CLIP with what the caption head adds to it.
    assert methods["vop"][0].startswith("0.00307 M") and float(methods["prompt_switch"][0].split()[0]) > 1
    assert (tmp_path / "retrieval_cost.svg").read_text().count("stroke-dasharray") == 1
    again = run(*command)
    assert "round" not in again.out and again.out == done.out[done.out.index("| a query over") :]


def test_a_power_of_ten_is_as_wide_as_high_up_as_low_down() -> None:
    plot = loglog.svg({"a & b": {10: (0.5, True), 100: (5.0, True), 1000: (50.0, False)}}, "videos", "seconds")
    found = re.findall(r'<path d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"[^>]* stroke-width="2"([^>]*)/>', plot)
    steps = [(float(x1) - float(x0), float(y1) - float(y0)) for x0, y0, x1, y1, _ in found]
    assert ["dasharray" in rest for *_, rest in found] == [False, True]  # what was not measured
    assert steps[0] == pytest.approx(steps[1], abs=0.2) and steps[0][0] > 0 > steps[0][1]
    assert "a &amp; b" in plot and ">0.1<" in plot and ">1,000<" in plot


def trial(number: int, *reports: tuple[float, float], status: Status = "finished", every: int = 10) -> Record:
    """Each report is (time, metric): an evaluation every so many steps and 3 worker seconds."""
    told = [
        {"step": every * i, "worker_s": 3.0 * i, "time": time, "mnr": metric, "rsum": metric}
        for i, (time, metric) in enumerate(reports, start=1)
    ]
    return Record(number, {}, "", status=status, reports=told)


def test_what_asha_takes_is_told_beside_the_grid() -> None:
    """By hand. Seen to fail counting only the trial that came there."""
    grid = [trial(0, (1, 9), (2, 6)), trial(1, (3, 8), (4, 4))]
    stopped = [
        trial(0, (1, 9), (5, 4.5)),
        trial(1, (2, 9), status="stopped"),
        trial(2, (8, 9), (9, 9), status="stopped"),
    ]
    seconds, steps = tuning.told("asha", grid, [stopped], 4.5)
    # Trial 0's two reports and trial 1's one; trial 2 reports after it.
    assert seconds.startswith(
        "asha, shares of the grid's 12 worker seconds: 1.250 in all; 0.750 [0.750, 0.750] until 4.500"
    )
    assert (
        steps.startswith("asha, shares of the grid's 40 steps: 1.250 in all; 0.750 [") and "in 1 of 1 orders" in steps
    )
    assert tuning.told("asha", grid, [stopped[1:]], 4.5)[0].endswith("none until 4.500, in 0 of 1 orders")


def test_trials_are_replayed_two_at_once() -> None:
    """Seen to fail where nothing begins when a trial is stopped."""
    study = configs.load(StudyConfig, "tiny", ["scheduler=asha", "reduction_factor=2"], STUDIES)
    base = resolve(study)  # an evaluation every second of four steps
    grid = [trial(n, (0, n), (0, n), every=2) for n in range(6)]  # the last is the best
    for order in range(8):
        whole = tuning.replayed(study, base, grid, order, stops=False)
        assert sorted(r.number for r in whole) == list(range(6)) and {r.status for r in whole} == {"finished"}
        assert sorted(report["time"] for r in whole for report in r.reports)[::2] == [3, 6, 9, 12, 15, 18]
        some = tuning.replayed(study, base, grid, order, stops=True)
        assert len(some) == 6 and next(r for r in some if r.number == 5).status == "finished"
        for place, record in enumerate(some):
            assert len(record.reports) == {"finished": 2, "stopped": 1}[record.status]
            if place >= 2 and record.number == 0:  # of the first two, each may be the first to report
                assert record.status == "stopped"
        ends = [report["time"] for r in some for report in r.reports]
        assert max(ends) <= 3 * (len(ends) // 2 + 1)


@pytest.mark.slow
def test_asha_at_toy_size(tmp_path: Path) -> None:
    """Mode asha: five short runs and what is told of them."""
    place = f"folder={tmp_path}"
    built = run("datasets_prep.build", "tiny", f"output={tmp_path / 'tiny'}", f"source.videos={tmp_path / 'videos'}")
    assert built.code == 0, built.err
    points = ["values=[2]", "rates=[1e-3]", "captions=[0.5,1.0]", "seeds=2", "steps=9", "batch_size=8", "minutes=14"]
    model = [f"dataset={tmp_path / 'tiny'}", "base=tiny", "backbone=tiny"]
    done = run("benchmarks.tuning", "asha", place, *points, *model, timeout_s=900)
    assert done.code == 0, done.out + done.err
    assert "with 3 seeds" in done.out and "asha, shares of the grid's 18 steps: " in done.out
