"""From raw samples to medians, spreads and ratios. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median, quantiles


@dataclass(frozen=True)
class Summary:
    """Of many samples of one quantity."""

    median: float
    q1: float  # a quarter of the samples is below
    q3: float  # a quarter is above
    low: float
    high: float
    mean: float
    count: int

    @property
    def spread(self) -> float:
        """Half the interquartile range, relative to the median."""
        return (self.q3 - self.q1) / 2 / self.median if self.median else 0.0


@dataclass(frozen=True)
class Ratio:
    """How many times faster ours is than a peer: of the medians, and the range over the repetitions."""

    value: float
    low: float
    high: float
    peer: str


def summarise(samples: Sequence[float]) -> Summary:
    """Raises ValueError without samples."""
    if not samples:
        raise ValueError("no samples")
    q1, _, q3 = quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else (samples[0],) * 3
    return Summary(median(samples), q1, q3, min(samples), max(samples), fmean(samples), len(samples))


def chunk_times(stamps: Sequence[Sequence[int]], turns: int) -> list[float]:
    """Nanoseconds per turn of each chunk, from every rank's clock at the chunks' ends.

    A chunk has ended when the last rank has ended it. So the chunks add up to the whole time, and a rank that runs
    ahead makes none of them shorter.
    """
    ends = [max(stamp) for stamp in zip(*stamps, strict=True)]
    return [(end - begin) / turns for begin, end in pairwise(ends)]


def flat(repetitions: Iterable[Iterable[float]]) -> list[float]:
    """All samples of all repetitions."""
    return [sample for repetition in repetitions for sample in repetition]


def ratio(peer: str, theirs: Sequence[Sequence[float]], ours: Sequence[Sequence[float]]) -> Ratio:
    """Their time over ours. Repetitions that were measured one after the other are compared with each other, so that
    what disturbs the machine for a while disturbs both."""
    pairs = [median(t) / median(o) for t, o in zip(theirs, ours, strict=False)]
    return Ratio(median(flat(theirs)) / median(flat(ours)), min(pairs), max(pairs), peer)


def best_peer(peers: dict[str, Sequence[Sequence[float]]], ours: Sequence[Sequence[float]]) -> Ratio | None:
    """The ratio to the peer with the smallest median; None without peers."""
    if not peers:
        return None
    best = min(peers, key=lambda name: median(flat(peers[name])))
    return ratio(best, peers[best], ours)
