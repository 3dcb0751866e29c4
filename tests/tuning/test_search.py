"""What the next trial gets is a function of the study and of the records before it."""

import json
from collections import Counter
from pathlib import Path
from statistics import median

import pytest

from tests.tuning.trials import no_records, record, study
from tuning.records import Record, Records
from tuning.search import propose

FRAMES = {"choice": [4, 6]}
PROMPTS = [{"choice": [2, 4], "when": {"model.num_frames": 4}}, {"quniform": [1, 3, 1]}]
LISTS = {"choice": [None, [0, 1], [2, 3]]}
SMALL = f"space={json.dumps({'model.num_frames': FRAMES, 'model.num_prompts': PROMPTS})}"
RATE = {"loguniform": [1e-5, 1e-1]}
WIDE = f"space={json.dumps({'optim.lr': RATE, 'model.num_frames': {'choice': [6, 12]}, 'model.cube_layers': LISTS})}"


def drawn(folder: Path, count: int, *overrides: str, restart: bool = False) -> list[dict]:
    """The values of `count` trials, each finished before the next is drawn; lr=1e-3 is best."""
    settings, base = study(*overrides)
    records = no_records(folder)
    for number in range(count):
        if restart:
            records = Records(str(folder))
        values = propose(settings, base, records)
        if values is None:
            break
        one = record(number, [1 / (1 + abs(values.get("optim.lr", 0) - 1e-3))])
        one.values, one.cost = values, 1.0
        records.save(one)
    return [r.values for r in records]


@pytest.mark.parametrize("searcher", ["random", "grid", "tpe"])
def test_a_small_space_is_drawn_once_and_then_is_over(tmp_path: Path, searcher: str) -> None:
    """Seen to fail where what is known already was not drawn anew."""
    found = drawn(tmp_path, 20, SMALL, f"searcher={searcher}")
    assert Counter(tuple(values.values()) for values in found) == Counter([(4, 2), (4, 4), (6, 1), (6, 2), (6, 3)])


@pytest.mark.parametrize("searcher", ["random", "tpe"])
def test_a_restart_draws_on(tmp_path: Path, searcher: str) -> None:
    """The history is what the records hold. Seen to fail where the searcher had one seed for all its draws."""
    whole = drawn(tmp_path / "whole", 16, WIDE, f"searcher={searcher}")
    assert drawn(tmp_path / "parts", 16, WIDE, f"searcher={searcher}", restart=True) == whole
    assert len({values["optim.lr"] for values in whole}) == 16
    assert drawn(tmp_path / "seed", 16, WIDE, f"searcher={searcher}", "seed=1") != whole


def test_tpe_learns_from_the_records(tmp_path: Path) -> None:
    only = f"space={json.dumps({'optim.lr': {'uniform': [1e-6, 1.0]}})}"
    rates = [values["optim.lr"] for values in drawn(tmp_path, 20, only, "searcher=tpe")]
    assert median(rates[10:]) < 0.5 * median(rates[:10])  # it draws at random until it knows ten


def test_lists_and_integers_come_as_they_are_written(tmp_path: Path) -> None:
    found = drawn(tmp_path / "wide", 12, WIDE, "searcher=tpe")
    assert {json.dumps(values["model.cube_layers"]) for values in found} == {"null", "[0, 1]", "[2, 3]"}
    assert {type(v["model.num_prompts"]) for v in drawn(tmp_path / "small", 5, SMALL, "searcher=tpe")} == {int}


def test_equal_configurations_by_other_values_are_one(tmp_path: Path) -> None:
    """The base has 6 frames: to draw 6 is the same as not to draw them."""
    domains = {"seed": {"choice": [0, 1]}, "model.num_frames": {"choice": [6], "when": {"seed": 0}}}
    settings, base = study(f"space={json.dumps(domains)}", "searcher=grid")
    records = no_records(tmp_path)
    records.save(Record(0, {"seed": 0}, "run"))
    assert propose(settings, base, records) == {"seed": 1}


def test_a_list_of_steps_is_drawn_as_it_is_listed(tmp_path: Path) -> None:
    """3 x 0.1 is 0.30000000000000004. Seen to fail: values came twice, and `when` did not hold."""
    space = {
        "losses.frequent_weight": {"quniform": [0, 1, 0.1]},
        "seed": {"choice": [7], "when": {"losses.frequent_weight": [0.3, 0.6, 0.7]}},
    }
    found = drawn(tmp_path, 11, f"space={json.dumps(space)}", "searcher=random")
    assert sorted(values["losses.frequent_weight"] for values in found) == [i / 10 for i in range(11)]
    assert sum("seed" in values for values in found) == 3


def test_two_objectives(tmp_path: Path) -> None:
    found = drawn(tmp_path, 14, WIDE, "searcher=tpe", "cost=images")
    assert len({json.dumps(values) for values in found}) == 14
