"""The model of many lags and ranks at once: against blsrdma.lag, by hand, and as it must behave."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from bench.simulate import LAGS, ends, latencies, per_iteration
from blsrdma.lag import max_plus
from dlrm import delays


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 25)), st.integers(0, 2**32),
    st.lists(st.one_of(st.integers(0, 30), st.just(inf)), max_size=4), st.floats(0, 1),
)  # fmt: skip
def test_equals_max_plus_bit_by_bit(shape: tuple[int, int, int], seed: int, lags: list[float], cost: float) -> None:
    work = np.random.default_rng(seed).exponential(1.0, shape)
    found = ends(work, lags, cost)
    assert found.shape == (len(lags), *shape[:2])
    for which, lag in enumerate(lags):
        for run, times in enumerate(work):
            assert found[which, run].tolist() == max_plus(times, lag, cost)[:, -1].tolist()


def test_two_ranks_by_hand() -> None:
    # Rank 0 stalls for 10 in iteration 0, rank 1 in iteration 2; everything else takes 1.
    work = np.array([[11.0, 1, 1, 1], [1, 1, 11, 1]])
    # lag 0: 11 + 1 + 11 + 1. lag 1: rank 1 begins iteration 2 when rank 0 has ended 0, at 11, ends it at 22, and 3 at
    # 23. lag 2: rank 1 has ended 2 at 13; it begins 3 then, after rank 0 has ended 0 at 11, and ends it at 14.
    assert (per_iteration(work, [0, 1, 2, inf]) * 4).tolist() == [24, 23, 14, 14]
    assert (per_iteration(work, [0, 1, 2, inf], cost=0.5) * 4).tolist() == [26, 24.5, 16, 16]


def by_definition(work: NDArray[np.float64], lag: int, delivery: float) -> list[float]:
    ranks, iterations = work.shape
    finish = np.zeros((ranks, iterations))
    for i in range(iterations):
        for r in range(ranks):
            start = finish[r, i - 1] if i else 0.0
            for q in range(ranks if i > lag else 0):
                start = max(start, finish[q, i - lag - 1] + (delivery if q != r else 0.0))
            finish[r, i] = start + work[r, i]
    found: list[float] = finish[:, -1].tolist()
    return found


@given(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 12)), st.integers(0, 2**32), st.integers(0, 14),
    st.floats(0.01, 3),
)  # fmt: skip
def test_a_delivery_holds_the_others_up(shape: tuple[int, int, int], seed: int, lag: int, delivery: float) -> None:
    work = np.random.default_rng(seed).exponential(1.0, shape)
    found = ends(work, [lag, inf], delivery=delivery)
    for run, times in enumerate(work):
        np.testing.assert_allclose(found[0, run], by_definition(times, lag, delivery), rtol=1e-12)
        np.testing.assert_allclose(found[1, run], times.sum(axis=1), rtol=1e-12)


def test_a_straggler_going_round_is_hidden_when_the_lag_reaches_its_next_turn() -> None:
    work = delays.parse("rotate:every=10,time=100ms", 0).table(10, 1000) + 1e-6
    times = per_iteration(work, [0, 8, 10, inf])
    assert times[0] == pytest.approx(10e-3, rel=1e-2)
    assert times[1] == pytest.approx(10e-3, rel=1e-2)
    assert times[2] == pytest.approx(5e-3, rel=2e-2)  # two of them stall at the same time
    assert times[3] == pytest.approx(1e-3, rel=2e-2)


def test_no_lag_hides_a_rank_that_is_slow_all_the_time() -> None:
    times = per_iteration(delays.parse("slow:time=2ms", 0).table(6, 50) + 1e-3, LAGS)
    np.testing.assert_allclose(times, 3e-3, rtol=1e-12)


@pytest.mark.parametrize(
    "text",
    ["none", "exp:p=0.1,mean=2ms", "lognormal:p=0.1,median=1ms,sigma=1", "rotate:every=10,time=10ms", "slow:time=1ms",
     "one:p=0.02,time=50ms", "pause:every=50,time=20ms"],
)  # fmt: skip
def test_a_thousand_ranks_lie_between_the_two_floors(text: str) -> None:
    work = delays.parse(text, 3).table(1024, 100) + 1e-3
    times = per_iteration(work, LAGS)
    assert times[0] == pytest.approx(work.max(axis=0).mean())
    assert times[-1] == pytest.approx(work.sum(axis=1).max() / 100)
    assert (np.diff(times) <= 1e-12).all()  # more lag is never slower


def test_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="shape"):
        ends(np.ones(3))
    with pytest.raises(ValueError, match="shape"):
        ends(np.ones((0, 3)))
    with pytest.raises(ValueError, match="no iterations"):
        per_iteration(np.ones((2, 0)))
    for lag in (-1, 0.5, float("nan")):
        with pytest.raises(ValueError, match="integer >= 0"):
            ends(np.ones((2, 2)), [0, lag])


def test_latencies_by_hand() -> None:
    # Rank 0 takes 5 for the first input; everything else takes 1. Inputs come at 1, 2 and 9.
    work, arrivals = np.array([[5.0, 1, 1], [1, 1, 1]]), [1.0, 2, 9]
    # Nobody waits for another: rank 0 has its results at 6, 7, 10, rank 1 at 2, 3, 10.
    assert latencies(work, arrivals, inf).tolist() == [[5, 5, 1], [1, 1, 1]]
    # Lag 1: rank 1 has ended its second iteration at 3, but the messages of both wait for rank 0.
    assert latencies(work, arrivals, 1).tolist() == [[5, 5, 1], [5, 5, 1]]
    # Lag 0: the second iteration begins at 6 on both. What the exchange costs is added to each.
    assert latencies(work, arrivals, 0).tolist() == [[5, 5, 1], [5, 5, 1]]
    assert latencies(work, arrivals, 0, cost=1).tolist() == [[6, 7, 2], [6, 7, 2]]


def test_latencies_of_a_closed_loop_end_where_the_model_ends() -> None:
    work = np.random.default_rng(1).exponential(1.0, (4, 60))
    for lag in (0, 2, 7):
        assert latencies(work, [0.0] * 60, lag)[:, -1].max() == ends(work, [lag])[0].max()
