"""When things happened on a rank, and the earliest they could have: the max-plus model of this engine's loop."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

clock = time.monotonic_ns  # one clock for all processes of a host

# Columns of Timeline.array().
BEGIN, POSTED, EMITTED, BEFORE, AFTER, SLEPT, ARRIVED = range(7)
COLUMNS = 7
PHASES = ("read", "lookup", "post", "wait", "assemble", "dense")


@dataclass
class Timeline:
    """One rank's run in nanoseconds; the lists have an entry per iteration, the first three are points in time.

    `before` and `after` are durations without the time inside the exchange. `before` is the work between the wait that
    the bound demands and the post: consuming iteration i-lag-1, the injected delay, the lookup. `after` is the work
    from the post to the next wait: bottom MLP, consuming what was ready, reading the next batch.
    """

    begin: list[int] = field(default_factory=list)  # the bound allowed the iteration's work
    posted: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)  # its predictions were ready
    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)
    slept: list[int] = field(default_factory=list)  # injected delay, as really slept; part of `before`
    arrived: list[int] = field(default_factory=list)  # the batch was there to be worked on; begin in a closed loop
    phases: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))  # nanoseconds of the whole run
    drain: int = 0  # work after the last wait for the bound: consuming what was still in flight
    start: int = 0
    end: int = 0

    def array(self) -> NDArray[np.int64]:
        """All of it, [iterations + 1, COLUMNS] by the columns above; the last row holds start, end and drain."""
        columns = (self.begin, self.posted, self.emitted, self.before, self.after, self.slept, self.arrived)
        last = (self.start, self.end, self.drain, *[0] * (COLUMNS - 3))
        return np.array([*zip(*columns, strict=True), last], np.int64)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside towards a phase."""
        started = clock()
        try:
            yield
        finally:
            self.phases[name] += clock() - started

    def split(self, name: str, part: str, nanoseconds: int) -> None:
        """Count that much of a phase towards another one."""
        self.phases[name] -= nanoseconds
        self.phases[part] += nanoseconds


class Stopwatch:
    """Time since the last lap, less the time spent `away` in the exchange."""

    def __init__(self) -> None:
        self._from = clock()
        self._away = 0

    @contextmanager
    def away(self) -> Iterator[None]:
        """Not to be counted."""
        left = clock()
        try:
            yield
        finally:
            self._away += clock() - left

    def lap(self) -> int:
        """Nanoseconds of own work since the last lap."""
        now = clock()
        spent = now - self._from - self._away
        self._from, self._away = now, 0
        return spent


def floor(before: NDArray[np.float64], after: NDArray[np.float64], drain: NDArray[np.float64], lag: int) -> float:
    """Seconds no run of these durations can be faster than, were the exchange free.

    `before` and `after` are [ranks, iterations], `drain` [ranks], as in Timeline, in seconds. This is the model of
    blsrdma.lag with the work split at the post, because other ranks wait for the post, not for the work behind it:

        begin[r,i] = max(posted[r,i-1] + after[r,i-1], max_q posted[q,i-lag-1]),  posted[r,i] = begin[r,i] + before[r,i]
    """
    ranks, iterations = before.shape
    posted = np.zeros((ranks, iterations))
    free = np.zeros(ranks)  # when each rank is done with what it did behind its latest post
    for i in range(iterations):
        bound = posted[:, i - lag - 1].max() if i > lag else 0.0
        posted[:, i] = np.maximum(free, bound) + before[:, i]
        free = posted[:, i] + after[:, i]
    return float(max((free + drain).max(), posted[:, -1].max())) if iterations else float(drain.max(initial=0.0))
