"""Intervals on cases whose answer is known."""

import numpy as np
import pytest

from training.intervals import bootstrap, over_runs
from training.metrics import Measured, summary

VIDEOS, CAPTIONS = 60, 10


def drawn(random: np.random.Generator) -> Measured:
    """Videos that are found at rank 1 with probability 0.5, by all of their captions alike: R@1 is 50 %."""
    ranks_V = np.where(random.random(VIDEOS) < 0.5, 1.0, 7.0)
    return Measured("", summary, ranks_V.repeat(CAPTIONS), np.arange(VIDEOS).repeat(CAPTIONS))


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Seen to fail with captions drawn one by one: they then hold it 39 % of the time."""
    random, held = np.random.default_rng(0), []
    for repetition in range(300):
        low, high = bootstrap(drawn(random), 200, 0.9, repetition)["r1"]
        held.append(low <= 50 <= high)
    assert 0.85 < np.mean(held) < 0.95


def test_the_width_is_that_of_the_binomial_and_the_same_seed_gives_the_same():
    measured = drawn(np.random.default_rng(1))
    found = bootstrap(measured, 4000, 0.95)
    share = measured.metrics()["r1"] / 100
    reach = 1.96 * 100 * np.sqrt(share * (1 - share) / VIDEOS)
    assert found["r1"] == pytest.approx((100 * share - reach, 100 * share + reach), abs=1.5)
    assert found.keys() == measured.metrics().keys()
    assert found["r10"] == (100, 100) and found["mnr"][0] < measured.metrics()["mnr"] < found["mnr"][1]
    assert bootstrap(measured, 50, 0.95) == bootstrap(measured, 50, 0.95) != bootstrap(measured, 50, 0.95, seed=1)


def test_the_mean_of_runs_has_students_interval():
    mean, (low, high) = over_runs([40.0, 42.0, 44.0], 0.95)
    assert mean == 42 and (low, high) == pytest.approx((42 - 4.303 * 2 / 3**0.5, 42 + 4.303 * 2 / 3**0.5), abs=1e-3)
