"""Where a lag helps, and where not: gains measured on this machine's ranks, and simulated for many more.

Between two exchanges every rank works for 1 ms (it sleeps, so that ranks need no cores), and is delayed now and then.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import numpy as np
from numpy.typing import NDArray

from bench.advise import Advice, advise, choices
from bench.cases import Case
from bench.delay_report import modelled, undelayed
from bench.harness import Effort as Blocks
from bench.paper.effort import Where
from bench.paper.folder import Arrays
from bench.results import Results
from bench.simulate import per_iteration
from bench.timings import Timings
from dlrm import delays

NAME = "where"
SIZE = "4K"
WORK = "all:time=1ms"
LAGS: tuple[float, ...] = (0, 1, 2, 4, 8, 16, 32, inf)
MEANS = (0.25, 0.5, 1, 2, 5, 10, 20, 50)
SLOW = (1.0, 1.1, 1.25, 1.5, 2.0, 3.0)  # how much longer one rank works, always
_MEAN = 5.0  # of the delays where another thing varies
_RANKS = 4  # the same
_RUNS = 4  # drawn for each point of a map
_COST = 20e-6  # of an exchange, in the maps; work is 1 ms
ADVISED = ("none", "exp:p=0.1,mean=2ms", "rotate:every=10,time=10ms", "slow:time=1ms", "pause:every=50,time=20ms")


def cases(effort: Where) -> list[Case]:
    """What is measured."""
    plans = ["none", *(f"{WORK}+exp:p=0.1,mean={mean:g}ms" for mean in effort.means)]
    return [Case(ranks, SIZE, lag, delay=one) for ranks in effort.ranks for one in plans for lag in effort.lags]


def blocks(effort: Where) -> Blocks:
    """For the harness."""
    return Blocks(effort.repeat, 0.05, effort.iterations, again=effort.again)


@dataclass(frozen=True)
class Check:
    """A measured run next to the simulator: of the delays as they were slept, and as they were drawn."""

    case: Case
    measured: float  # ms per iteration, median
    simulated: float  # the same
    drawn: float  # measured / simulated without knowing what was slept


def checks(results: Results) -> list[Check]:
    """Of every delayed case."""
    found = []
    for m in results.measurements:
        if not m.stalls:
            continue
        cost = undelayed(results, m.case)
        simulated = float(np.median(modelled(m, m.case.lag, cost))) / 1e6
        plan = [delays.parse(m.case.delay, one).table(m.case.ranks, m.turns) for one in range(len(m.samples))]
        drawn = float(np.median(per_iteration(np.stack(plan), [m.case.lag], cost / 1e9)[0])) * 1e3
        measured = m.summary.median / 1e6
        found.append(Check(m.case, measured, simulated, measured / drawn))
    return found


def maps(effort: Where) -> Arrays:
    """Simulated gains over lag 0, each [what varies, LAGS], in the order of the axes above."""
    length = effort.simulated_iterations
    return {
        "mean": np.stack([_gain(_RANKS, mean, 1.0, length) for mean in MEANS]),
        "slow": np.stack([_gain(_RANKS, _MEAN, slow, length) for slow in SLOW]),
        "ranks": np.stack([_gain(ranks, _MEAN, 1.0, length) for ranks in effort.simulated_ranks]),
        "ranks, mean": np.stack([
            [_gain(ranks, mean, 1.0, length, (0, 8))[1] for mean in MEANS] for ranks in effort.simulated_ranks
        ]),
    }  # fmt: skip


def _gain(ranks: int, mean: float, slow: float, iterations: int, lags: tuple[float, ...] = LAGS) -> NDArray[np.float64]:
    """Time at lag 0 over that at each lag."""
    plan = f"{WORK}+exp:p=0.1,mean={mean:g}ms"
    work = np.stack([delays.parse(plan, seed).table(ranks, iterations) for seed in range(_RUNS)])
    work[:, -1] += (slow - 1) * 1e-3
    seconds = per_iteration(work, lags, _COST).mean(axis=-1)
    found: NDArray[np.float64] = seconds[0] / seconds
    return found


def advice(cost: float, plans: tuple[str, ...] = ADVISED) -> list[tuple[str, list[float], Advice]]:
    """What `bench advise` says to a job of 4 ranks that works for 1 ms: gains by lag, and its advice, by plan."""
    found = []
    for plan in plans:
        busy = delays.parse(WORK if plan == "none" else f"{WORK}+{plan}", 0).table(_RANKS, 2000) + cost
        timings = Timings(plan, busy)
        every = choices(timings, [0, 1, 2, 4, 8, 16], 1 << 20)
        found.append((plan, [one.gain for one in every], advise(timings, every, 1 << 40)))
    return found
