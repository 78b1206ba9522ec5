"""Injected delays: plans of who stalls when, and for how long.

    exp:p=0.1,mean=2ms                  each rank, in each iteration, with probability p, for an exponential time
    lognormal:p=0.1,median=1ms,sigma=1  the same with a log-normal time: mostly short, now and then very long
    rotate:every=10,time=10ms           a straggler going round: in every 10th iteration one rank, each time the next
    slow:time=1ms                       the last rank, in each iteration: no lag can hide it
    one:p=0.02,time=50ms                the last rank, at random
    pause:every=200,time=20ms           each rank once in every 200 iterations, at a place of its own: as a garbage
                                        collector does
    all:time=1ms                        every rank, in each iteration: as work of its own would take
    all:time=1ms+exp:p=0.1,mean=2ms     plans may be added up

A plan is a pure function of seed, rank and iteration, so the same run delays the same ranks at the same iterations.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dlrm.errors import OptionError

Seconds = NDArray[np.float64]

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_DURATION = re.compile(r"([0-9]*\.?[0-9]+)(us|ms|s)")
_DRAWS = 4  # random numbers of one counter of Philox, so of one rank and iteration


class Delay(ABC):
    """A plan of delays."""

    @abstractmethod
    def row(self, rank: int, first: int, count: int, ranks: int) -> Seconds:
        """How long `rank` of `ranks` stalls in each of the `count` iterations from `first` on, in seconds."""

    def seconds(self, rank: int, iteration: int, ranks: int) -> float:
        """How long `rank` of `ranks` stalls in `iteration`."""
        return float(self.row(rank, iteration, 1, ranks)[0])

    def table(self, ranks: int, iterations: int) -> Seconds:
        """Everything: shape (ranks, iterations)."""
        return np.stack([self.row(rank, 0, iterations, ranks) for rank in range(ranks)])


@dataclass(frozen=True)
class NoDelay(Delay):
    """No stalls at all."""

    def row(self, rank: int, first: int, count: int, ranks: int) -> Seconds:  # noqa: ARG002 - see Delay
        """Zeros."""
        return np.zeros(count)

    def seconds(self, rank: int, iteration: int, ranks: int) -> float:  # noqa: ARG002 - see Delay
        """Zero, at no cost."""
        return 0.0


@dataclass(frozen=True)
class Exponential(Delay):
    """Each rank stalls in each iteration with probability `p`, for an exponentially distributed time."""

    p: float
    mean: float  # seconds
    seed: int

    def row(self, rank: int, first: int, count: int, ranks: int) -> Seconds:  # noqa: ARG002 - see Delay
        """See `Delay.row`."""
        draws = _uniform(self.seed, rank, first, count)
        return np.where(draws[:, 0] < self.p, -self.mean * np.log1p(-draws[:, 1]), 0.0)


@dataclass(frozen=True)
class LogNormal(Delay):
    """Each rank stalls in each iteration with probability `p`, for a log-normally distributed time."""

    p: float
    median: float  # seconds
    sigma: float  # of the logarithm
    seed: int

    def row(self, rank: int, first: int, count: int, ranks: int) -> Seconds:  # noqa: ARG002 - see Delay
        """See `Delay.row`."""
        draws = _uniform(self.seed, rank, first, count)
        normal = np.sqrt(-2 * np.log1p(-draws[:, 1])) * np.cos(2 * np.pi * draws[:, 2])
        return np.where(draws[:, 0] < self.p, self.median * np.exp(self.sigma * normal), 0.0)


@dataclass(frozen=True)
class Rotating(Delay):
    """Every `every` iterations one rank stalls for `time` seconds, each time the next one."""

    every: int
    time: float

    def row(self, rank: int, first: int, count: int, ranks: int) -> Seconds:
        """See `Delay.row`."""
        turn, rest = np.divmod(np.arange(first, first + count), self.every)
        return np.where((rest == self.every - 1) & (turn % ranks == rank), self.time, 0.0)


@dataclass(frozen=True)
class LastRank(Delay):
    """The last rank stalls for `time` seconds, in each iteration with probability `p`; nobody else ever does."""

    p: float
    time: float
    seed: int

    def row(self, rank: int, first: int, count: int, ranks: int) -> Seconds:
        """See `Delay.row`."""
        if rank != ranks - 1:
            return np.zeros(count)
        return np.where(_uniform(self.seed, rank, first, count)[:, 0] < self.p, self.time, 0.0)


@dataclass(frozen=True)
class Pauses(Delay):
    """Each rank stalls for `time` seconds once in each period of `every` iterations, in one drawn for it."""

    every: int
    time: float
    seed: int

    def row(self, rank: int, first: int, count: int, ranks: int) -> Seconds:  # noqa: ARG002 - see Delay
        """See `Delay.row`."""
        period, place = np.divmod(np.arange(first, first + count), self.every)
        chosen = _uniform(self.seed, rank, int(period[0]), int(period[-1] - period[0]) + 1)[:, 0] if count else period
        return np.where(place == np.floor(chosen[period - period[:1]] * self.every), self.time, 0.0)


@dataclass(frozen=True)
class Work(Delay):
    """Every rank takes `time` seconds, in each iteration."""

    time: float

    def row(self, rank: int, first: int, count: int, ranks: int) -> Seconds:  # noqa: ARG002 - see Delay
        """See `Delay.row`."""
        return np.full(count, self.time)


@dataclass(frozen=True)
class Sum(Delay):
    """Plans one after the other, in the same iteration."""

    plans: tuple[Delay, ...]

    def row(self, rank: int, first: int, count: int, ranks: int) -> Seconds:
        """See `Delay.row`."""
        rows: Seconds = np.sum([plan.row(rank, first, count, ranks) for plan in self.plans], axis=0)
        return rows


_WANTED = {
    "exp": {"p", "mean"}, "lognormal": {"p", "median", "sigma"}, "rotate": {"every", "time"}, "slow": {"time"},
    "one": {"p", "time"}, "pause": {"every", "time"}, "all": {"time"},
}  # fmt: skip
_KNOWN = (
    "exp:p=0.1,mean=2ms, lognormal:p=0.1,median=1ms,sigma=1, rotate:every=10,time=10ms, slow:time=1ms, "
    "one:p=0.02,time=50ms, pause:every=200,time=20ms or all:time=1ms, or several of them with + between"
)


def parse(text: str, seed: int) -> Delay:
    """The plan that --delay describes. Raises OptionError naming what is wrong."""
    if text in ("", "none"):
        return NoDelay()
    if "+" in text:
        return Sum(tuple(parse(one, seed) for one in text.split("+")))
    kind, _, rest = text.partition(":")
    words = dict(word.partition("=")[::2] for word in rest.split(",") if word)
    if set(words) != _WANTED.get(kind):
        raise OptionError(f"--delay {text!r} is not understood: wanted {_KNOWN}")
    times = {name: _duration(text, name, words[name]) for name in ("mean", "median", "time") if name in words}
    p = _number(text, "p", words.get("p", "1"))
    if not 0 <= p <= 1:
        raise OptionError(f"--delay {text!r}: p={words['p']} is not between 0 and 1")
    every = _number(text, "every", words.get("every", "1"))
    if not every >= 1 or not every.is_integer():
        raise OptionError(f"--delay {text!r}: every={words['every']} is not a number of iterations >= 1")
    if kind == "exp":
        return Exponential(p, times["mean"], seed)
    if kind == "lognormal":
        sigma = _number(text, "sigma", words["sigma"])
        if not 0 <= sigma <= 10:
            raise OptionError(f"--delay {text!r}: sigma={words['sigma']} is not between 0 and 10")
        return LogNormal(p, times["median"], sigma, seed)
    if kind == "rotate":
        return Rotating(int(every), times["time"])
    if kind == "all":
        return Work(times["time"])
    if kind == "pause":
        return Pauses(int(every), times["time"], seed)
    return LastRank(p, times["time"], seed)  # slow is one with p = 1


def _uniform(seed: int, rank: int, first: int, count: int) -> Seconds:
    # Philox's counter is the iteration, so that a single iteration costs as little as it says, and a row no loop.
    bits = np.random.Philox(key=seed, counter=[first, 0, rank, 0])
    return np.random.Generator(bits).random((count, _DRAWS))


def _number(text: str, name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise OptionError(f"--delay {text!r}: {name}={value} is not a number") from None


def _duration(text: str, name: str, value: str) -> float:
    match = _DURATION.fullmatch(value)
    if not match:
        raise OptionError(f"--delay {text!r}: {name}={value} is not a time such as 2ms, 300us or 1s")
    return float(match[1]) * _UNITS[match[2]]
