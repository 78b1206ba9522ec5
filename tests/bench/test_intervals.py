"""Intervals: against numbers that are known."""

from __future__ import annotations

import pytest

from bench.intervals import Interval, of_median, of_ratio


def test_nothing_varies() -> None:
    assert of_median([3.0] * 5) == Interval(3, 3, 3)
    assert of_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]) == Interval(2, 2, 2)  # the same repetitions of both are drawn


def test_two_repetitions() -> None:
    # Drawn again: both the first (a quarter of the draws), both the second, or one of each.
    assert of_median([1.0, 3.0]) == Interval(2, 1, 3)
    assert of_ratio([2.0, 2.0], [1.0, 4.0]) == Interval(0.8, 0.5, 2)


def test_an_interval_holds_the_true_median_about_as_often_as_it_says() -> None:
    import numpy as np

    random = np.random.default_rng(1)
    found = [of_median(random.normal(0, 1, 25).tolist()) for _ in range(200)]
    assert 0.88 < np.mean([one.low <= 0 <= one.high for one in found]) < 0.99
    assert np.mean([one.high - one.low for one in found]) == pytest.approx(2 * 1.96 * 1.2533 / 5, rel=0.15)


def test_what_one_has_more_is_left_out() -> None:
    assert of_ratio([2.0, 2.0, 100.0], [1.0, 1.0]) == Interval(2, 2, 2)


def test_no_repetitions() -> None:
    with pytest.raises(ValueError, match="no repetitions"):
        of_median([])
