"""Injected delays: `exp:p=0.1,mean=2ms` (random stalls) and `rotate:every=10,time=10ms` (a straggler going round)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dlrm.errors import OptionError

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_DURATION = re.compile(r"([0-9]*\.?[0-9]+)(us|ms|s)")
_KNOWN = "exp:p=0.1,mean=2ms or rotate:every=10,time=10ms"


class Delay(Protocol):
    """A plan of delays: a pure function, so the same run delays the same ranks at the same iterations."""

    def seconds(self, rank: int, iteration: int, ranks: int) -> float:
        """How long `rank` of `ranks` stalls in `iteration`."""
        ...


@dataclass(frozen=True)
class NoDelay:
    """No stalls at all."""

    def seconds(self, rank: int, iteration: int, ranks: int) -> float:  # noqa: ARG002 - see Delay
        """Zero."""
        return 0.0


@dataclass(frozen=True)
class Exponential:
    """Each rank stalls in each iteration with probability `p`, for an exponentially distributed time."""

    p: float
    mean: float  # seconds
    seed: int

    def seconds(self, rank: int, iteration: int, ranks: int) -> float:  # noqa: ARG002 - see Delay
        """See `Delay.seconds`."""
        happens, length = np.random.default_rng([self.seed, rank, iteration]).random(2)
        return float(-self.mean * np.log1p(-length)) if happens < self.p else 0.0


@dataclass(frozen=True)
class Rotating:
    """Every `every` iterations one rank stalls for `time` seconds, each time the next one."""

    every: int
    time: float

    def seconds(self, rank: int, iteration: int, ranks: int) -> float:
        """See `Delay.seconds`."""
        turn, rest = divmod(iteration, self.every)
        return self.time if rest == self.every - 1 and turn % ranks == rank else 0.0


def parse(text: str, seed: int) -> Delay:
    """The plan that --delay describes. Raises OptionError naming what is wrong."""
    if text in ("", "none"):
        return NoDelay()
    kind, _, rest = text.partition(":")
    words = dict(word.partition("=")[::2] for word in rest.split(",") if word)
    wanted = {"exp": {"p", "mean"}, "rotate": {"every", "time"}}.get(kind)
    if wanted is None or set(words) != wanted:
        raise OptionError(f"--delay {text!r} is not understood: wanted {_KNOWN}")
    if kind == "exp":
        probability = _number(text, "p", words["p"])
        if not 0 <= probability <= 1:
            raise OptionError(f"--delay {text!r}: p={words['p']} is not between 0 and 1")
        return Exponential(probability, _duration(text, "mean", words["mean"]), seed)
    every = _number(text, "every", words["every"])
    if not every >= 1 or not every.is_integer():
        raise OptionError(f"--delay {text!r}: every={words['every']} is not a number of iterations >= 1")
    return Rotating(int(every), _duration(text, "time", words["time"]))


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
