"""What every system has in common, so that all do the same work in the same loop."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Job:
    """What one rank has to exchange. sizes: [phase][source][destination], bytes."""

    name: str  # unique among the jobs of a runtime
    system: str
    rank: int
    ranks: int
    lag: int
    copy_self: bool
    sizes: list[list[list[int]]]

    @cached_property
    def largest(self) -> int:
        return max(size for phase in self.sizes for row in phase for size in row)

    def without_self(self) -> Job:
        """The same, but nobody sends itself anything: what a peer does where we have a view."""
        ranks = range(self.ranks)
        sizes = [[[0 if p == q else phase[p][q] for q in ranks] for p in ranks] for phase in self.sizes]
        return replace(self, sizes=sizes)

    def sent(self) -> list[list[int]]:
        """Bytes this rank sends, by phase and destination."""
        return [phase[self.rank] for phase in self.sizes]

    def received(self) -> list[list[int]]:
        """Bytes this rank gets, by phase and source."""
        return [[row[self.rank] for row in phase] for phase in self.sizes]


def pieces(out: Bytes, counts: Sequence[int]) -> list[Bytes]:
    """The messages that lie in `out` one after the other. Made once for each buffer: cutting takes longer than a short
    message, and is none of the library's work."""
    return np.split(out[: sum(counts)], np.cumsum(counts)[:-1])


class System(ABC):
    """An exchange that is ready for its loop.

    The loop calls turn(0), turn(1), ... and finish(). A turn completes iteration i - lag - 1 and starts iteration i:
    the order that bounds the lag. Two hooks, both None while time is taken: `produce` writes the send buffer of
    iteration i just before it starts; `consume` gets the messages of iteration i, by source, when it is complete.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.depth = job.lag + 1  # iterations in flight
        self.phases = len(job.sizes)
        self.next = 0
        self.produce: Callable[[int, Any], None] | None = None
        self.consume: Callable[[int, Sequence[Any]], None] | None = None

    @abstractmethod
    def turn(self, i: int) -> None:
        """Complete i - lag - 1, start i."""

    @abstractmethod
    def finish(self, i: int) -> None:
        """Complete all that is in flight; iteration i would be next."""

    def facts(self) -> dict[str, Any]:
        """What is worth recording: memory, transports."""
        return {}

    @abstractmethod
    def close(self) -> None: ...


class Runtime(ABC):
    """A library in one rank, before any exchange is open."""

    rank: int
    ranks: int

    def __init__(self, name: str) -> None:
        self.name = name

    def hello(self) -> dict[str, Any]:
        """What the other ranks have to know before join()."""
        return {}

    @abstractmethod
    def join(self, hellos: list[dict[str, Any]]) -> dict[str, Any]:
        """Called on every rank with every rank's hello. Returns versions."""

    @abstractmethod
    def open(self, job: Job) -> System:
        """Called on every rank at the same time."""

    def close(self) -> None:  # noqa: B027  (not every library wants it)
        """Leave."""
