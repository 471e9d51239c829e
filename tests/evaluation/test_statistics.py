"""Intervals against closed forms, the sign test against its table, and dependence that widens."""

import math

import numpy as np
import pytest

from chroma_jax.evaluation import statistics


def test_a_mean_has_the_interval_of_its_standard_error():
    values = np.random.default_rng(1).normal(3.0, 2.0, 400)
    found = statistics.mean(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert found.value == pytest.approx(values.mean())
    assert found.n == 400
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)
    assert statistics.mean(values) == found
    assert statistics.mean(values, seed=1) != found


def test_a_ratio_is_of_the_sums():
    found = statistics.ratio([1, 0, 0], [1, 10, 9])
    assert found.value == pytest.approx(0.05)
    assert found.low == 0.0 < found.high


def test_of_nothing_there_is_no_mean():
    assert statistics.mean([]) is None
    assert statistics.crossed_mean([], [], []) is None


def test_denominators_must_count():
    with pytest.raises(ValueError, match="positive"):
        statistics.ratio([1.0], [0.0])


@pytest.mark.parametrize(
    ("wins", "losses", "want"),
    [(0, 0, 1.0), (5, 5, 1.0), (10, 0, 2 / 1024), (8, 2, 2 * 56 / 1024), (44, 103, 1.255e-6)],
    ids=["none", "even", "all", "eight_of_ten", "the_papers_ncmos"],
)
def test_sign_test(wins, losses, want):
    assert statistics.sign_test(wins, losses) == pytest.approx(want, rel=0.02)


def test_answers_of_one_listener_are_not_independent():
    """Twelve listeners who each say one thing fifteen times know as much as twelve answers, not as 180."""
    opinions = np.random.default_rng(0).choice([-1.0, 1.0], 12)
    values = np.repeat(opinions, 15)
    sessions, items = np.repeat(np.arange(12), 15), np.tile(np.arange(15), 12)
    crossed, single = statistics.crossed_mean(values, sessions, items), statistics.mean(values)
    assert crossed.value == single.value
    want = 2 * 1.96 * opinions.std() / math.sqrt(12)
    assert crossed.high - crossed.low == pytest.approx(want, rel=0.15)
    assert single.high - single.low < 0.5 * want


def test_the_papers_scmos_shows_nothing():
    """67 to 70 with 28 ties: the interval of plain answers that the counts give is ±13.9 points."""
    values = np.repeat([1.0, -1.0, 0.0], [67, 70, 28])
    found = statistics.mean(values)
    assert 100 * found.value == pytest.approx(-1.8, abs=0.05)
    assert 50 * (found.high - found.low) == pytest.approx(13.9, abs=0.3)
