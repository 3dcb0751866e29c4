"""Who is stopped: what Ray's schedulers say, also after a restart."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from tests.tuning.trials import no_records, record, study
from tuning.records import Records
from tuning.stopping import is_behind

STEPS = ("overrides.optim.steps=18",)  # nine evaluations
CURVES = [[40, 45, 50], [10, 20, 30], [50, 55, 60], [5, 6, 7], [60, 61, 62], [45, 50, 58], [20, 30, 40]]


def decisions(folder: Path, restart: bool, *overrides: str) -> list[list[bool]]:
    """Trial after trial, evaluation after evaluation, until it is stopped; the decisions of each."""
    settings, base = study(*STEPS, *overrides)
    records, found = no_records(folder), []
    for number, curve in enumerate(CURVES):
        found.append([])
        for length in range(1, len(curve) + 1):
            if restart:
                records = Records(str(folder))
            records.all = [r for r in records if r.number != number]
            one = record(number, curve[:length])
            for report in one.reports:
                report["time"] += 1000 * number
            records.save(one)
            found[-1].append(is_behind(settings, base, one, records))
            if found[-1][-1]:
                break
    return found


def ray_says() -> list[list[bool]]:
    """The same curves through one scheduler that lives from the first report to the last."""
    scheduler = ASHAScheduler(time_attr="t", metric="rsum", mode="max", max_t=10, reduction_factor=3)
    found = []
    for number, curve in enumerate(CURVES):
        trial = SimpleNamespace(trial_id=number)
        scheduler.on_trial_add(None, trial)
        found.append([])
        for t, value in enumerate(curve, start=1):
            found[-1].append(scheduler.on_trial_result(None, trial, {"t": t, "rsum": value}) == TrialScheduler.STOP)
            if found[-1][-1]:
                break
    return found


@pytest.mark.parametrize("restart", [False, True])
def test_asha_is_rays_and_remembers(tmp_path: Path, restart: bool) -> None:
    """Seen to fail where only the trial's own reports were replayed."""
    found = decisions(tmp_path, restart, "scheduler=asha")
    assert found == ray_says()
    assert [any(stops) for stops in found] == [False, True, False, True, False, True, True]


def test_median_stops_what_is_below(tmp_path: Path) -> None:
    found = decisions(tmp_path, True, "scheduler=median", "grace_reports=2")
    assert found[0] == found[1] == found[2] == [False] * 3  # three others are needed to know a median
    assert found[3] == [False, True] and found[6] == [False, True] and found[4] == [False] * 3


def test_lower_can_be_better(tmp_path: Path) -> None:
    settings, base = study(*STEPS, "scheduler=asha", "metric=mnr", "mode=min")
    records = no_records(tmp_path)
    for number, rank in enumerate([3.0, 2.0, 9.0, 1.0]):
        one = record(number, [0.0])
        one.reports[0]["mnr"] = rank
        records.save(one)
    assert [is_behind(settings, base, one, records) for one in records] == [True, False, True, False]


def test_the_last_evaluation_and_no_scheduler_stop_nobody(tmp_path: Path) -> None:
    """Seen to fail where a trial was judged at its end: it lost its test metrics, and saved nothing."""
    settings, base = study(*STEPS, "scheduler=asha")
    records = no_records(tmp_path)
    for number in (0, 1):
        records.save(record(number, [9 - number] * 9))
    assert not is_behind(settings, base, records.all[1], records)
    records.all[1].reports = records.all[1].reports[:3]
    assert is_behind(settings, base, records.all[1], records)
    assert not is_behind(*study(*STEPS), records.all[1], records)
