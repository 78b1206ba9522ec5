"""The part of `python -m bench stress` that runs in every rank.

The run is a series of phases, each an Exchange of its own with a random lag and window. All ranks draw the same
settings and sizes from the seed; each draws its own delays and habits. Every byte of every message is checked.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.systems.ours import Ours
from bench.values import Pool
from blsrdma import Exchange, Handle

WINDOWS = [64, 1000, 4096, 16384]
LAGS = [0, 0, 1, 2, 3, 4, 8]
_LARGE = 0.15  # of the iterations have messages larger than a window
_BATCH = 256  # iterations whose sizes are drawn at once
_REPORT_SECONDS = 0.3


@dataclass(frozen=True)
class Phase:
    """What all ranks agree on for a while."""

    number: int
    first: int  # iteration of the whole run; makes the values of each phase different
    iterations: int
    lag: int
    window_bytes: int
    copy_self: bool

    def __str__(self) -> str:
        return (
            f"phase {self.number} (iterations {self.first} to {self.first + self.iterations - 1}, lag {self.lag}, "
            f"windows of {self.window_bytes} bytes, copy_self {self.copy_self})"
        )


def phases(iterations: int, seed: int) -> Iterator[Phase]:
    """The same on every rank."""
    draw = np.random.RandomState(seed)
    shortest, longest = max(20, iterations // 400), max(80, iterations // 100)
    first = number = 0
    while first < iterations:
        length = min(int(draw.randint(shortest, longest + 1)), iterations - first)
        yield Phase(
            number, first, length, int(draw.choice(LAGS)), int(draw.choice(WINDOWS)), bool(draw.randint(2))
        )  # fmt: skip
        first += length
        number += 1


def sizes(phase: Phase, ranks: int, seed: int, max_windows: int) -> Iterator[list[list[int]]]:
    """[source][destination] of each iteration of the phase: none, a few bytes, any, and all around whole windows."""
    draw = np.random.RandomState([seed & 0xFFFFFFFF, phase.number, 7])
    window = phase.window_bytes
    left = phase.iterations
    while left > 0:
        shape = (min(left, _BATCH), ranks, ranks)
        # Most iterations stay within a window, so that a long run ends; in the others anything goes.
        windows = np.where(draw.rand(shape[0], 1, 1) < _LARGE, max_windows, 1)
        kind = draw.rand(*shape)
        edges = draw.randint(1, windows + 1, shape) * window + draw.randint(-1, 2, shape) * (windows > 1)
        drawn = np.select(
            [kind < 0.2, kind < 0.5, kind < 0.6],
            [np.zeros(shape, np.int64), draw.randint(1, 65, shape), edges],
            draw.randint(0, windows * window + 1, shape),
        )
        drawn[draw.rand(shape[0]) < 0.01] = 0  # an iteration in which nobody has anything to say
        drawn[draw.rand(*shape[:2]) < 0.02] = 0  # a rank that has nothing for anybody
        yield from np.clip(drawn, 0, windows * window).tolist()
        left -= shape[0]


class Tally:
    """What a rank did."""

    def __init__(self) -> None:
        self.iterations = self.bytes = self.exchanges = self.sleeps = self.max_lead = 0
        self.paths: set[str] = set()


def run(
    runtime: Ours, progress: Callable[[int], None], iterations: int, seed: int, max_windows: int, delays: float
) -> dict[str, Any]:
    """delays: the probability that a rank sleeps in an iteration. Raises what went wrong, with the phase's settings."""
    pool = Pool(max(WINDOWS) * max_windows, seed & 0xFFFFFFFF)
    tally, began = Tally(), time.monotonic()
    habits = np.random.RandomState([seed & 0xFFFFFFFF, runtime.rank, 11])
    for phase in phases(iterations, seed):
        try:
            _phase(runtime, phase, pool, habits, tally, progress, seed, max_windows, delays)
        except Exception as error:
            raise RuntimeError(f"{phase}, seed {seed}: {type(error).__name__}: {error}") from error
    progress(tally.iterations)
    return {
        "iterations": tally.iterations, "checked_bytes": tally.bytes, "exchanges": tally.exchanges,
        "sleeps": tally.sleeps, "max_lead": tally.max_lead, "paths": sorted(tally.paths),
        "seconds": time.monotonic() - began,
    }  # fmt: skip


def _phase(
    runtime: Ours, phase: Phase, pool: Pool, habits: np.random.RandomState, tally: Tally,
    progress: Callable[[int], None], seed: int, max_windows: int, delays: float,
) -> None:  # fmt: skip
    rank, ranks = runtime.rank, runtime.ranks
    pending: deque[tuple[Handle, list[int]]] = deque()

    def complete() -> None:
        handle, expected = pending.popleft()
        when = phase.first + handle.iteration
        with handle as messages:
            for source, (message, size) in enumerate(zip(messages, expected, strict=True)):
                pool.check(message, source, rank, when, size)
                tally.bytes += size
        tally.iterations += 1

    reported = time.monotonic()
    asleep = _sleeps(habits, phase.iterations, delays)
    with Exchange(
        runtime.store, rank, ranks, name=f"stress-{seed}-{phase.number}", lag=phase.lag,
        window_bytes=phase.window_bytes, copy_self=phase.copy_self,
    ) as exchange:  # fmt: skip
        for i, table in enumerate(sizes(phase, ranks, seed, max_windows)):
            if i % 3 == 0:  # not everybody calls begin()
                exchange.begin()
            if asleep[i]:
                time.sleep(asleep[i])
                tally.sleeps += 1
            if len(pending) > phase.lag:
                complete()
            while pending and (i + rank) % 5 == 0 and pending[0][0].ready():  # some take what is there
                complete()
            parts = [pool.message(rank, q, phase.first + i, size) for q, size in enumerate(table[rank])]
            handle = exchange.post(np.concatenate(parts), table[rank])
            pending.append((handle, [row[rank] for row in table]))
            if (now := time.monotonic()) - reported > _REPORT_SECONDS:
                reported = now
                progress(tally.iterations)
        while pending:
            complete()
        stats = exchange.stats()
        tally.max_lead = max(tally.max_lead, stats["max_lead"])
        tally.paths |= {f"{p['path']} ({p['transport']})" for p in stats["peers"] if p["path"] != "self"}
    tally.exchanges += 1


def _sleeps(habits: np.random.RandomState, iterations: int, probability: float) -> NDArray[np.float64]:
    """Seconds to sleep before each iteration: mostly none, rarely some milliseconds, very rarely many."""
    seconds = np.where(habits.rand(iterations) < probability, habits.exponential(1e-3, iterations), 0.0)
    seconds[habits.rand(iterations) < probability / 100] = 0.05
    return seconds
