"""What a run leaves: measurements with their raw samples, as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.cases import Case
from bench.summary import Summary, flat, summarise


@dataclass
class Measurement:
    """One system on one case. samples: by repetition, nanoseconds per iteration of each chunk."""

    case: Case
    system: str
    turns: int  # iterations in a chunk
    samples: list[list[float]] = field(default_factory=list)
    checked_bytes: int = 0  # compared with what was sent, outside the timed parts, all ranks together
    cpu_ns: list[float] = field(default_factory=list)  # by repetition: processor time of all ranks for an iteration
    others: list[float] = field(default_factory=list)  # by repetition: cores that other processes kept busy
    facts: list[dict[str, Any]] = field(default_factory=list)  # by rank
    stalls: list[list[list[list[int]]]] = field(default_factory=list)  # by repetition and rank: iteration, ns slept
    stolen: list[float] = field(default_factory=list)  # by repetition: cores that the hypervisor took, part of others
    disturbed: list[float] = field(default_factory=list)  # others of each repetition that was therefore measured anew

    @property
    def summary(self) -> Summary:
        return summarise(flat(self.samples))

    def slept(self, repetition: int) -> NDArray[np.float64]:
        """Nanoseconds that delays really took in a delayed repetition: (ranks, iterations)."""
        found = np.zeros((self.case.ranks, self.turns))
        for rank, pairs in enumerate(self.stalls[repetition]):
            for iteration, nanoseconds in pairs:
                found[rank, iteration] = nanoseconds
        return found


@dataclass
class Results:
    """A whole run."""

    command: str
    options: dict[str, Any]
    environment: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)  # by runtime
    launch: dict[str, list[str]] = field(default_factory=dict)  # by runtime and ranks: settings it was started with
    measurements: list[Measurement] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # what, and why

    def of(self, case: Case) -> dict[str, Measurement]:
        """By system."""
        return {m.system: m for m in self.measurements if m.case == case}

    def cases(self) -> list[Case]:
        """In the order measured."""
        return list(dict.fromkeys(m.case for m in self.measurements))

    def systems(self) -> list[str]:
        """In the order measured."""
        return list(dict.fromkeys(m.system for m in self.measurements))

    def save(self, path: Path) -> None:
        """Written beside and renamed: a run that is interrupted leaves the last whole file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_text(json.dumps(_rounded(asdict(self)), indent=1) + "\n")
        unfinished.rename(path)

    @staticmethod
    def load(path: Path) -> Results:
        return Results.of_values(json.loads(path.read_text()))

    @staticmethod
    def of_values(data: dict[str, Any]) -> Results:
        """From what asdict has made of them."""
        data = dict(data)
        measurements = [Measurement(**{**m, "case": Case(**m["case"])}) for m in data.pop("measurements")]
        return Results(measurements=measurements, **data)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4) if abs(value) < 100 else round(value, 1)
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_rounded(item) for item in value]
    return value
