"""The lag rules and the max-plus model of what a lag can give: pure arithmetic, no I/O.

*Lag* k: a rank begins its work on iteration i only when it has completed iteration i - k - 1; k = 0 is the synchronous
collective. *Lead*: the iteration a rank works on minus the slowest rank's; it never exceeds k.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def due(iteration: int, lag: int) -> int:
    """The iteration that must be complete before work on `iteration` begins; negative: none."""
    return iteration - lag - 1


def max_plus(work: ArrayLike, lag: float, cost: float = 0.0) -> NDArray[np.float64]:
    """When each rank ends each iteration, if the lag bound were all that held it back.

    T[r, i] = max(T[r, i-1], max over q of T[q, i-lag-1]) + work[r, i] + cost, all in seconds.

    Parameters: `work`, shape (ranks, iterations): time spent outside the exchange; `lag`, an integer >= 0 or infinity
    (no synchronisation at all); `cost` of the exchange itself per iteration. Returns T, shape (ranks, iterations).
    """
    spent = np.asarray(work, dtype=np.float64) + cost
    if spent.ndim != 2:
        raise ValueError(f"work must have the shape (ranks, iterations), not {spent.shape}")
    if lag < 0:
        raise ValueError(f"lag must be >= 0, not {lag}")
    ranks, iterations = spent.shape
    if lag >= iterations:
        return np.cumsum(spent, axis=1)
    lag = int(lag)
    finish = np.empty_like(spent)
    own = np.zeros(ranks)
    for i in range(iterations):
        if i > lag:
            own = np.maximum(own, finish[:, i - lag - 1].max())
        own = own + spent[:, i]
        finish[:, i] = own
    return finish
