"""When things happened on a rank, and the earliest they could have: the max-plus model of this engine's loop."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

clock = time.monotonic_ns  # one clock for all processes of a host

# Columns of Timeline.array().
BEGIN, POSTED, EMITTED, BEFORE, AFTER, SLEPT, ARRIVED = range(7)
COLUMNS = 7
PHASES = ("read", "lookup", "post", "wait", "assemble", "dense")


class Span:
    """Time in one phase, summed up; not to be entered again before it is left. No generator: it is entered often."""

    __slots__ = ("_began", "_profile", "_working", "nanoseconds", "processor")

    def __init__(self, profile: bool = False) -> None:
        self._profile = profile
        self.nanoseconds = self.processor = self._began = self._working = 0

    def __enter__(self) -> None:
        self._began = clock()
        if self._profile:
            self._working = time.thread_time_ns()

    def __exit__(self, *_: object) -> None:
        if self._profile:
            self.processor += time.thread_time_ns() - self._working
        self.nanoseconds += clock() - self._began


def sleep_for(seconds: float) -> int:
    """Sleep for an injected delay, if there is one; nanoseconds as really slept, which is longer than asked for."""
    if seconds <= 0:
        return 0
    began = clock()
    time.sleep(seconds)
    return clock() - began


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
    drain: int = 0  # work after the last wait for the bound: consuming what was still in flight
    start: int = 0
    end: int = 0
    profile: bool = False  # count processor time of the phases, too

    def __post_init__(self) -> None:
        self._spans = {name: Span(self.profile) for name in PHASES}

    def phase(self, name: str) -> Span:
        """`with timeline.phase(name):` counts the time inside towards a phase; `assemble` is inside `dense`."""
        return self._spans[name]

    def phases(self) -> dict[str, int]:
        """Nanoseconds of the whole run in each phase, which do not overlap."""
        found = {name: span.nanoseconds for name, span in self._spans.items()}
        return found | {"dense": found["dense"] - found["assemble"]}

    def processor(self) -> dict[str, int] | None:
        """The same of processor time, of the thread that serves; None without a profile."""
        found = {name: span.processor for name, span in self._spans.items()}
        return found | {"dense": found["dense"] - found["assemble"]} if self.profile else None

    def array(self) -> NDArray[np.int64]:
        """All of it, [iterations + 1, COLUMNS] by the columns above; the last row holds start, end and drain."""
        columns = (self.begin, self.posted, self.emitted, self.before, self.after, self.slept, self.arrived)
        last = (self.start, self.end, self.drain, *[0] * (COLUMNS - 3))
        return np.array([*zip(*columns, strict=True), last], np.int64)


class Stopwatch:
    """Own work since the last lap: without what a timeline counts as waiting or posting."""

    def __init__(self, timeline: Timeline) -> None:
        self._away = (timeline.phase("wait"), timeline.phase("post"))
        self._from, self._left = clock(), self._elsewhere()

    def _elsewhere(self) -> int:
        return sum(span.nanoseconds for span in self._away)

    def lap(self) -> int:
        """Nanoseconds since the last lap; not to be called while waiting or posting."""
        now, left = clock(), self._elsewhere()
        spent = now - self._from - (left - self._left)
        self._from, self._left = now, left
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
