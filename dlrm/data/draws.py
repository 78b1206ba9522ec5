"""How generated data choose rows: distributions over a table, drawn by a generator that the caller has seeded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dlrm.errors import OptionError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HEAD = 1 << 16  # ranks whose probabilities are summed up one by one; the rest follow their integral


class Draw(Protocol):
    """A distribution of rows."""

    def rows(self, random: np.random.Generator, table: int, size: int, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows below `size` of table number `table` for bags of `lengths`, one bag after another."""
        ...


@dataclass(frozen=True)
class UniformDraw:
    """Every row alike."""

    def rows(self, random: np.random.Generator, table: int, size: int, lengths: NDArray[np.int64]) -> NDArray[np.int64]:  # noqa: ARG002 - see Draw
        """See `Draw.rows`."""
        return random.integers(0, size, int(lengths.sum()), dtype=np.int64)


@dataclass(frozen=True)
class Gaussian:
    """Normal, rounded and clipped to the table, as in the reference; `mu` -1: the middle of the table."""

    mu: float = -1.0
    sigma: float = 1.0

    def rows(self, random: np.random.Generator, table: int, size: int, lengths: NDArray[np.int64]) -> NDArray[np.int64]:  # noqa: ARG002 - see Draw
        """See `Draw.rows`."""
        mu = (size - 1) / 2 if self.mu == -1 else self.mu
        drawn = random.normal(mu, self.sigma, int(lengths.sum()))
        return np.clip(np.round(drawn), 0, size - 1).astype(np.int64)


@dataclass(frozen=True)
class Zipf:
    """Zipf-Mandelbrot: the row of rank k has probability ~ 1 / (k + q) ** s, k from 1; ranks are scattered over rows.

    `hot` rows of every table take a further `share` of all draws between them.
    """

    s: float
    q: float = 0.0
    hot: int = 0
    share: float = 0.0

    def rows(self, random: np.random.Generator, table: int, size: int, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Draw.rows`."""
        count = int(lengths.sum())
        ranks = self.ranks(random.random(count), size)
        chosen = random.random(count)
        heavy = chosen < self.share
        if heavy.any():
            ranks[heavy] = (chosen[heavy] / self.share * min(self.hot, size)).astype(np.int64)
        return scatter(ranks, table, size)

    def ranks(self, uniform: NDArray[np.float64], size: int) -> NDArray[np.int64]:
        """Ranks from 0 for numbers in [0, 1)."""
        head = _head(self.s, self.q, min(size, _HEAD))
        tail = self._integral(size + 0.5) - self._integral(len(head) + 0.5) if size > len(head) else 0.0
        at = uniform * (head[-1] + tail)
        found: NDArray[np.int64] = np.searchsorted(head, at, side="right").astype(np.int64)
        beyond = at >= head[-1]
        if tail and beyond.any():
            value = self._integral(len(head) + 0.5) + (at[beyond] - head[-1])
            found[beyond] = np.round(self._inverse(value)).astype(np.int64) - 1
        return np.asarray(np.minimum(found, size - 1))

    def _integral(self, k: float) -> float:
        """Of the density up to rank k, but for a constant."""
        x = k + self.q
        return float(np.log(x) if self.s == 1 else x ** (1 - self.s) / (1 - self.s))

    def _inverse(self, value: NDArray[np.float64]) -> NDArray[np.float64]:
        x = np.exp(value) if self.s == 1 else (value * (1 - self.s)) ** (1 / (1 - self.s))
        return np.asarray(x - self.q)


@dataclass(frozen=True)
class Pareto:
    """The first row of a bag is uniform; the others follow from it, Pareto distributed, as in MLPerf v2's data."""

    a: float = 0.25

    def rows(self, random: np.random.Generator, table: int, size: int, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """See `Draw.rows`."""
        first = random.integers(0, size, len(lengths), dtype=np.int64)
        bag = np.repeat(np.arange(len(lengths)), lengths)
        place = np.arange(len(bag)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        mixed = mix(first[bag].astype(np.uint64) * np.uint64(1 << 20) + place.astype(np.uint64), table)
        uniform = (mixed >> np.uint64(11)).astype(np.float64) / float(1 << 53)
        drawn = np.floor((1 - uniform) ** (-1 / self.a) - 1)
        rows = np.fmod(drawn, size).astype(np.int64)
        return np.where(place == 0, first[bag], rows)


@lru_cache(maxsize=64)
def _head(s: float, q: float, ranks: int) -> NDArray[np.float64]:
    """Cumulated weights of the first ranks."""
    return np.cumsum((np.arange(1, ranks + 1) + q) ** -s)


def mix(values: NDArray[np.uint64], salt: int) -> NDArray[np.uint64]:
    """A 64-bit hash (splitmix64)."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(((salt + 1) * 0x9E3779B97F4A7C15) & (2**64 - 1))
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(z ^ (z >> np.uint64(31)))


def scatter(ranks: NDArray[np.int64], table: int, size: int) -> NDArray[np.int64]:
    """Ranks below `size` as rows, one to one, popular ones far apart."""
    step = max(1, int(size * 0.6180339887)) + table % 7
    while np.gcd(step, size) != 1:
        step += 1
    return np.asarray((ranks * step + table * 7919) % size)


def parse(text: str) -> Draw:
    """The distribution that --rand-data-dist describes. Raises OptionError."""
    kind, _, rest = text.partition(":")
    try:
        words = {name: float(value) for name, _, value in (word.partition("=") for word in rest.split(",") if word)}
        known = {"uniform": set(), "gaussian": {"mu", "sigma"}, "zipf": {"s", "q", "hot", "share"}, "pareto": {"a"}}
        if not words.keys() <= known[kind]:
            raise OptionError(f"--rand-data-dist {text!r}: {kind} has {', '.join(sorted(known[kind])) or 'no values'}")
    except (KeyError, ValueError) as error:
        if isinstance(error, OptionError):
            raise
        wanted = "uniform, gaussian[:mu=,sigma=], zipf:s=[,q=][,hot=,share=] or pareto[:a=]"
        raise OptionError(f"--rand-data-dist {text!r} is not understood: wanted {wanted}") from None
    if kind == "uniform":
        return UniformDraw()
    if kind == "gaussian":
        return Gaussian(**words)
    if kind == "pareto":
        if not words.get("a", 1) > 0:
            raise OptionError(f"--rand-data-dist {text!r}: a must be above 0")
        return Pareto(**words)
    hot, share = int(words.pop("hot", 0)), words.pop("share", 0.0)
    if "s" not in words or not words["s"] > 0 or not words.get("q", 0) >= 0:
        raise OptionError(f"--rand-data-dist {text!r}: zipf wants s above 0, and q no less than 0")
    if not 0 <= share <= 1 or (hot > 0) != (share > 0):
        raise OptionError(f"--rand-data-dist {text!r}: hot rows want a share between 0 and 1, and the other way round")
    return Zipf(words["s"], words.get("q", 0.0), hot, share)
