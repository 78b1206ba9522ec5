"""The max-plus model of blsrdma.lag for many lags, many ranks and many runs at once. Pure arithmetic.

Give it the time that each rank spends in each iteration without waiting for others: measured, or drawn from a plan of
dlrm.delays (`delays.parse(text, seed).table(ranks, iterations) + compute`). It says how long the whole takes at each
lag. Lag infinity is an exchange that couples no loops: each rank takes the sum of its own times.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import numpy as np
from numpy.typing import ArrayLike, NDArray

LAGS = (0, 1, 2, 4, 8, 16, inf)


def ends(work: ArrayLike, lags: Sequence[float] = LAGS, cost: float = 0.0) -> NDArray[np.float64]:
    """When each rank ends its last iteration, in seconds: shape (lags, ..., ranks).

    work: (..., ranks, iterations), seconds outside the exchange; leading axes are independent runs. lags: integers
    >= 0 or infinity. cost: of the exchange itself per iteration. The last column of blsrdma.lag.max_plus, bit by bit.
    """
    spent = np.moveaxis(np.asarray(work, dtype=np.float64), -1, 0) + cost  # one block of memory for each iteration
    if spent.ndim < 2 or spent.shape[-1] < 1:
        raise ValueError(f"work must have the shape (..., ranks, iterations), not {np.shape(work)}")
    if bad := [lag for lag in lags if not lag >= 0 or (lag != inf and lag != int(lag))]:
        raise ValueError(f"a lag must be an integer >= 0 or infinity, not {bad[0]}")
    iterations, runs = len(spent), spent.shape[1:-1]
    own = np.zeros((len(lags), *spent.shape[1:]))
    complete = np.zeros((iterations, len(lags), *runs, 1))  # when the slowest rank ended an iteration, by lag and run
    for i in range(iterations):
        for which, lag in enumerate(lags):
            if i > lag:
                np.maximum(own[which], complete[i - int(lag) - 1, which], out=own[which])
        own += spent[i]
        own.max(axis=-1, keepdims=True, out=complete[i])
    return own


def per_iteration(work: ArrayLike, lags: Sequence[float] = LAGS, cost: float = 0.0) -> NDArray[np.float64]:
    """Seconds per iteration until the slowest rank has ended: shape (lags, ...). See `ends`."""
    iterations = np.shape(work)[-1] if np.ndim(work) else 0
    if iterations < 1:
        raise ValueError(f"work has no iterations: its shape is {np.shape(work)}")
    slowest: NDArray[np.float64] = ends(work, lags, cost).max(axis=-1)
    return slowest / iterations
