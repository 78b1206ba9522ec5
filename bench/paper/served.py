"""What `bench.paper.dlrm` has measured of one workload, asked: times, ratios, latencies, and the model of each run."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench import intervals
from bench.intervals import Interval
from bench.paper.dlrm import ALONE, NONE
from bench.paper.folder import Part
from bench.simulate import latencies, per_iteration

Quantiles = tuple[float, ...]
QUANTILES: Quantiles = (50, 95, 99, 99.9)


@dataclass(frozen=True)
class Served:
    """One workload's part."""

    part: Part

    @property
    def name(self) -> str:
        return str(self.part.values["workload"])

    @property
    def undelayed(self) -> float:
        """ms per iteration of the fastest system: c of the model, the ranks' own work in it."""
        return float(self.part.values["undelayed_ms"])

    @property
    def runs(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.part.values["runs"]
        return found

    def cases(self) -> list[str]:
        """In order: none, means of delays, capacity, loads."""
        return list(dict.fromkeys(run["case"] for run in self.runs))

    def levels(self) -> list[str]:
        """Those of them that are means of delays, in undelayed iterations."""
        return [case for case in self.cases() if case[0].isdigit()]

    def systems(self, case: str = NONE) -> list[str]:
        """That took part, but for the one process."""
        return [name for name in dict.fromkeys(r["system"] for r in self.runs if r["case"] == case) if name != ALONE]

    def times(self, case: str, system: str) -> list[float]:
        """ms per iteration, by repetition."""
        return [run["ms"] for run in self.runs if (run["case"], run["system"]) == (case, system)]

    def lag(self, system: str) -> float:
        """Of the model."""
        lag = next(run["lag"] for run in self.runs if run["system"] == system)
        return inf if lag is None else float(lag)

    def best(self, case: str, systems: list[str]) -> str:
        """The one with the smallest median."""
        return min(systems, key=lambda name: median(self.times(case, name)))

    def ours(self, case: str) -> list[str]:
        """Systems of ours, in the same placement as the others."""
        return [one for one in self.systems(case) if not _peer(one) and not _better(one)]

    def peers(self, case: str) -> list[str]:
        """Others' systems, in the same placement."""
        return [one for one in self.systems(case) if _peer(one) and not _better(one)]

    def synchronous(self, case: str) -> list[str]:
        """Everything at lag 0, ours too, in the same placement."""
        return [one for one in self.systems(case) if self.lag(one) == 0 and not _better(one)]

    def uncoupled(self, case: str) -> list[str]:
        """Those that couple no loops, in the same placement."""
        return [one for one in self.systems(case) if self.lag(one) == inf and not _better(one)]

    def better(self, case: str) -> list[str]:
        """All with the better placement."""
        return [one for one in self.systems(case) if _better(one)]

    def ratio(self, case: str, above: str, below: str) -> Interval:
        """Time of one over that of another."""
        return intervals.of_ratio(self.times(case, above), self.times(case, below))

    def _numbers(self, case: str, system: str) -> list[int]:
        return [n for n, run in enumerate(self.runs) if (run["case"], run["system"]) == (case, system)]

    def slept(self, case: str, system: str) -> list[NDArray[np.float64]]:
        """Seconds, (ranks, iterations), by repetition."""
        return [self.part.arrays[f"{n}/slept"] / 1e9 for n in self._numbers(case, system)]

    def model_gain(self, case: str, system: str) -> float:
        """Time by the model at lag 0 over that at the system's, of its delays as they were slept."""
        cost, lag = self.undelayed / 1e3, self.lag(system)
        pairs = [per_iteration(slept, [0, lag], cost) for slept in self.slept(case, system)]
        return median(float(one[0] / one[1]) for one in pairs)

    def over_model(self, case: str, system: str) -> Interval:
        """Measured / model at the system's lag."""
        cost, lag = self.undelayed / 1e3, self.lag(system)
        models = [float(per_iteration(slept, [lag], cost)[0]) * 1e3 for slept in self.slept(case, system)]
        return intervals.of_median([m / x for m, x in zip(self.times(case, system), models, strict=True)])

    def latency(self, case: str, system: str) -> NDArray[np.float64]:
        """ms from arrival to prediction, QUANTILES of all ranks' batches: (repetitions, quantiles)."""
        found = [self.part.arrays[f"{n}/latency"] / 1e6 for n in self._numbers(case, system)]
        return np.array([np.percentile(one, QUANTILES) for one in found])

    def model_latency(self, case: str, system: str) -> NDArray[np.float64]:
        """The same by the model: of the same arrivals and sleeps, each iteration as long as the fastest undelayed."""
        cost, lag, found = self.undelayed / 1e3, self.lag(system), []
        for number, slept in zip(self._numbers(case, system), self.slept(case, system), strict=True):
            arrived = self.part.arrays[f"{number}/arrived"] / 1e9
            found.append(np.percentile(latencies(slept, arrived, lag, cost) * 1e3, QUANTILES))
        return np.array(found)


def _peer(system: str) -> bool:
    return system.startswith(("gloo", "Open MPI", "TorchRec"))


def _better(system: str) -> bool:
    return system.endswith("sharded better")
