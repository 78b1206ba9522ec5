"""Mode auto: whether bags of a table that can be read here are read or asked for, from costs measured at the start.

Both ways are tried on the rows themselves, with short bags and long ones: a bag of n rows costs `bag + n * row` ns
either way, so the choice depends on how long the bags of an ask are, and on the table's rows (dim and format). Tables
of one owner whose rows are alike share a measurement. Bits are the same either way.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from blsrdma.lookup_tables import address

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from blsrdma.lookup_tables import TableFacts
    from blsrdma.ucx import native

BAGS = 64  # of a trial
SHORT, LONG = 1, 32  # rows of each
TRIALS = 5  # the best counts: all are of the same rows, for pages are mapped once
_READ, _ASK = (0.0, 0.0, 1.0, 1.0), (1.0, 1.0, 0.0, 0.0)  # costs that make the core do one or the other


@dataclass(frozen=True)
class Choice:
    """What a measurement found: ns of a bag, and of each of its rows. `tables`: those that it is of."""

    owner: int
    tables: tuple[int, ...]
    read_bag: float
    read_row: float
    ask_bag: float
    ask_row: float

    @property
    def costs(self) -> tuple[float, float, float, float]:
        """As the core takes them."""
        return self.read_bag, self.read_row, self.ask_bag, self.ask_row

    def __str__(self) -> str:
        """What is chosen, in words."""
        bag, row = self.ask_bag - self.read_bag, self.ask_row - self.read_row
        if bag >= 0 and row >= 0:
            return "read"
        if bag <= 0 and row <= 0:
            return "ask"
        rows = -bag / row
        return f"ask for bags of {'more' if row < 0 else 'less'} than {rows:.0f} rows, read others"


def measure(core: native.Lookup, tables: Sequence[TableFacts], rank: int, timeout_ns: int) -> Iterator[Choice]:
    """Try both ways for the tables of other ranks that can be read here, and let the core choose by what was found.

    An owner that does not answer is left out: what cannot be measured is read.
    """
    alike: dict[tuple[int, str, int], list[int]] = {}
    for number, facts in enumerate(tables):
        if facts.owner != rank and core.readable(facts.owner) and facts.rows:
            alike.setdefault((facts.owner, facts.format, facts.dim), []).append(number)
    for (owner, _, _), numbers in alike.items():
        largest = max(numbers, key=lambda number: tables[number].rows)
        found = [_per_bag(core, largest, tables[largest], costs, timeout_ns) for costs in (_READ, _ASK)]
        if None in found:
            continue
        (read_bag, read_row), (ask_bag, ask_row) = found  # type: ignore[misc]
        choice = Choice(owner, tuple(tables[n].table for n in numbers), read_bag, read_row, ask_bag, ask_row)
        for number in numbers:
            core.prefer(number, choice.costs)
        yield choice


def _per_bag(
    core: native.Lookup, number: int, facts: TableFacts, costs: tuple[float, float, float, float], timeout_ns: int
) -> tuple[float, float] | None:
    """ns of a bag and of each of its rows; None where there was no answer."""
    core.prefer(number, costs)
    took = []
    rng = np.random.default_rng(facts.table)
    out = np.empty(BAGS * facts.dim, np.float32)
    for length in (SHORT, LONG):
        offsets = np.arange(0, BAGS * length + 1, length)
        indices = rng.integers(0, facts.rows, BAGS * length)
        best = float("inf")
        for _ in range(TRIALS):
            part = (number, False, address(indices), indices.size, address(offsets), BAGS, 0, address(out), facts.dim)
            began = time.perf_counter_ns()
            outcome, ask = core.ask([part], timeout_ns)
            outcome = outcome or core.wait(ask, timeout_ns)
            best = min(best, time.perf_counter_ns() - began)
            if outcome:
                core.prefer(number, _READ)
                return None
            core.forget(ask)
        took.append(best / BAGS)
    row = max(0.0, (took[1] - took[0]) / (LONG - SHORT))
    return max(0.0, took[0] - SHORT * row), row
