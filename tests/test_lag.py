"""The max-plus model: against its definition, and at its two ends."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from blsrdma.lag import due, max_plus

works = st.tuples(st.integers(1, 5), st.integers(0, 20), st.integers(0, 2**32)).map(
    lambda shape: np.random.default_rng(shape[2]).exponential(1.0, shape[:2])
)


def by_definition(work: NDArray[np.float64], lag: int, cost: float) -> NDArray[np.float64]:
    ranks, iterations = work.shape
    finish = np.zeros((ranks, iterations))
    for i in range(iterations):
        for r in range(ranks):
            start = finish[r, i - 1] if i else 0.0
            if due(i, lag) >= 0:
                start = max(start, *finish[:, due(i, lag)])
            finish[r, i] = start + work[r, i] + cost
    return finish


@given(works, st.integers(0, 25), st.floats(0, 1))
def test_follows_its_definition(work: NDArray[np.float64], lag: int, cost: float) -> None:
    np.testing.assert_allclose(max_plus(work, lag, cost), by_definition(work, lag, cost), rtol=1e-12)


@given(works)
def test_lag_0_adds_the_maxima_and_no_bound_adds_each_rank(work: NDArray[np.float64]) -> None:
    if not work.shape[1]:
        return
    np.testing.assert_allclose(max_plus(work, 0)[:, -1].max(), work.max(axis=0).sum(), rtol=1e-12)
    np.testing.assert_allclose(max_plus(work, np.inf)[:, -1].max(), work.sum(axis=1).max(), rtol=1e-12)


@given(works, st.integers(0, 20))
def test_more_lag_is_never_slower(work: NDArray[np.float64], lag: int) -> None:
    assert (max_plus(work, lag + 1) <= max_plus(work, lag) + 1e-9).all()


def test_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="lag"):
        max_plus(np.ones((2, 2)), -1)
    with pytest.raises(ValueError, match="shape"):
        max_plus(np.ones(3), 1)
