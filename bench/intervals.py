"""Bootstrap intervals of medians, and of ratios of medians, over repetitions. Pure arithmetic.

What is drawn again are repetitions, not single samples: samples of one repetition share whatever disturbed it. Of two
systems the same repetitions are drawn, as they were measured one after the other. With the three to seven repetitions
of a usual run an interval is about the range of what was seen; it does not claim more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
_DRAWS, _SEED = 2000, 20251219


@dataclass(frozen=True)
class Interval:
    """A value, and between what it lies (LEVEL of the draws)."""

    value: float
    low: float
    high: float


def of_median(values: Sequence[float]) -> Interval:
    """The median of one value for each repetition. Raises ValueError without any."""
    one = _column(values)
    return _interval(float(np.median(one)), np.median(one[_draws(len(one))], axis=1))


def of_ratio(above: Sequence[float], below: Sequence[float]) -> Interval:
    """The median of `above` over that of `below`, values of the same repetitions; what one has more is left out."""
    count = min(len(above), len(below))
    a, b = _column(above[:count]), _column(below[:count])
    draws = _draws(count)
    ratios = np.median(a[draws], axis=1) / np.median(b[draws], axis=1)
    return _interval(float(np.median(a) / np.median(b)), ratios)


def _column(values: Sequence[float]) -> NDArray[np.float64]:
    if not len(values):
        raise ValueError("no repetitions")
    return np.asarray(values, np.float64)


def _draws(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(_SEED).integers(count, size=(_DRAWS, count))


def _interval(value: float, found: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, min(value, float(low)), max(value, float(high)))
