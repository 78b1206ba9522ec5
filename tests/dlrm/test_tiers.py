"""Which rows are hot: arithmetic, without a device."""

from __future__ import annotations

import numpy as np
import pytest

from dlrm.gpu import tiers

ROWS = (1000, 10, 300)
NOTHING = [np.empty(0, np.int64)] * 3


def test_everything_is_hot_where_it_fits() -> None:
    budget = sum(tiers.padded(rows * 64) for rows in ROWS)
    assert all(tier.whole and not tier.mapped for tier in tiers.choose(ROWS, 64, budget, NOTHING))
    assert not all(tier.whole for tier in tiers.choose(ROWS, 64, budget - 1, NOTHING))


@pytest.mark.parametrize("budget", [0, 5000, 7000, 10_000, 40_000, 80_000])
def test_the_budget_is_kept_and_the_rows_that_are_asked_for_most_come_first(budget: int) -> None:
    random = np.random.default_rng(budget)
    asked = [np.minimum(random.geometric(0.02, 500), rows) - 1 for rows in ROWS]
    found = tiers.choose(ROWS, 64, budget, asked)
    assert sum(tier.gpu_bytes(64) for tier in found) <= budget
    often = [np.bincount(some, minlength=rows) for some, rows in zip(asked, ROWS, strict=True)]
    rows = [np.arange(tier.rows) if tier.hot is None else tier.hot for tier in found]
    hot = [often[t][some] for t, some in enumerate(rows)]
    cold = [np.delete(often[t], some) for t, some in enumerate(rows)]
    assert min(np.concatenate(hot), default=1 << 30) >= max(np.concatenate(cold), default=0)
    for tier, some in zip(found, rows, strict=True):
        assert (np.diff(some) > 0).all()
        slots = tier.slots()
        assert (np.flatnonzero(slots >= 0) == some).all()
        assert (slots[some] == np.arange(tier.hot_rows)).all()


def test_room_that_is_left_goes_to_the_smallest_tables() -> None:
    found = tiers.choose(ROWS, 64, 30_000, [np.array([7, 7, 900]), NOTHING[0], np.array([5])])
    assert found[1].whole
    assert found[0].hot is not None
    assert {7, 900} <= set(found[0].hot.tolist())
    assert found[2].mapped or found[2].whole
    assert sum(tier.hot_rows for tier in found) == (30_000 - 256 * 3 - 4096 - 256 - 1280) // 64
