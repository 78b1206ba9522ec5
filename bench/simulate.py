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


def ends(
    work: ArrayLike, lags: Sequence[float] = LAGS, cost: float = 0.0, delivery: float = 0.0
) -> NDArray[np.float64]:
    """When each rank ends its last iteration, in seconds: shape (lags, ..., ranks).

    work: (..., ranks, iterations), seconds outside the exchange; leading axes are independent runs. lags: integers
    >= 0 or infinity. cost: of the exchange itself per iteration, which keeps a rank busy. delivery: how much later the
    others know that a rank has ended an iteration, which keeps nobody busy, so that a lag hides it.
    Without delivery, the last column of blsrdma.lag.max_plus, bit by bit.
    """
    spent = np.moveaxis(np.asarray(work, dtype=np.float64), -1, 0) + cost  # one block of memory for each iteration
    if spent.ndim < 2 or spent.shape[-1] < 1:
        raise ValueError(f"work must have the shape (..., ranks, iterations), not {np.shape(work)}")
    if bad := [lag for lag in lags if not lag >= 0 or (lag != inf and lag != int(lag))]:
        raise ValueError(f"a lag must be an integer >= 0 or infinity, not {bad[0]}")
    iterations, shape = len(spent), (len(lags), *spent.shape[1:])
    own = np.zeros(shape)
    # By iteration, lag and run: when the slowest rank ended it, who that was, and when the slowest but one did.
    slowest, second = np.zeros((2, iterations, *shape[:-1], 1))
    who = np.zeros((iterations, *shape[:-1], 1), np.intp)
    for i in range(iterations):
        for which, lag in enumerate(lags):
            if i > lag:
                place = i - int(lag) - 1, which
                np.maximum(own[which], slowest[place], out=own[which])
                if delivery > 0:
                    others = np.broadcast_to(slowest[place], shape[1:]).copy()
                    np.put_along_axis(others, who[place], second[place], axis=-1)
                    np.maximum(own[which], others + delivery, out=own[which])
        own += spent[i]
        own.max(axis=-1, keepdims=True, out=slowest[i])
        if delivery > 0:
            who[i] = own.argmax(axis=-1, keepdims=True)
            second[i] = np.partition(own, -2, axis=-1)[..., -2:-1] if shape[-1] > 1 else -inf
    return own


def per_iteration(
    work: ArrayLike, lags: Sequence[float] = LAGS, cost: float = 0.0, delivery: float = 0.0
) -> NDArray[np.float64]:
    """Seconds per iteration until the slowest rank has ended: shape (lags, ...). See `ends`."""
    iterations = np.shape(work)[-1] if np.ndim(work) else 0
    if iterations < 1:
        raise ValueError(f"work has no iterations: its shape is {np.shape(work)}")
    last: NDArray[np.float64] = ends(work, lags, cost, delivery).max(axis=-1)
    return last / iterations


def latencies(work: ArrayLike, arrivals: ArrayLike, lag: float, cost: float = 0.0) -> NDArray[np.float64]:
    """Open loop: seconds from the arrival of each iteration's input to its result, as early as possible: the same shape
    as work, (ranks, iterations).

    arrivals: seconds, (iterations,) or (ranks, iterations), increasing. A rank begins when it has ended what came
    before, the input is there, and the lag allows. The result is there when all ranks have ended the iteration, whose
    messages it needs; at lag infinity, where nobody waits for another's loop, when the rank itself has.
    """
    spent = np.asarray(work, np.float64) + cost
    came = np.broadcast_to(np.asarray(arrivals, np.float64), spent.shape)
    ended = np.zeros_like(spent)
    own = np.zeros(len(spent))
    for i in range(spent.shape[1]):
        begin = np.maximum(own, came[:, i])
        if i > lag:
            begin = np.maximum(begin, ended[:, i - int(lag) - 1].max())
        own = ended[:, i] = begin + spent[:, i]
    ready = ended if lag == inf else ended.max(axis=0)
    result: NDArray[np.float64] = ready - came
    return result
