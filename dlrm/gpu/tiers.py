"""Which rows of a rank's tables lie in GPU memory, where not all of them fit: those that are asked for most.

Pure arithmetic. A table that is there whole, or not at all, needs no map; else int32 [rows] says where a row is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Rows = NDArray[np.int64]

ALIGNMENT = 256  # of what is allocated
SLOT_BYTES = 4


@dataclass(frozen=True)
class Tier:
    """Of one table: its rows, and those of them that are hot, rising; None: all are."""

    rows: int
    hot: Rows | None

    @property
    def hot_rows(self) -> int:
        """How many are hot."""
        return self.rows if self.hot is None else len(self.hot)

    @property
    def whole(self) -> bool:
        """Whether all rows are hot."""
        return self.hot_rows == self.rows

    @property
    def mapped(self) -> bool:
        """Whether it needs a map."""
        return 0 < self.hot_rows < self.rows

    def slots(self) -> NDArray[np.int32]:
        """Where among the hot rows each row is, or -1."""
        found = np.full(self.rows, -1, np.int32)
        found[slice(None) if self.hot is None else self.hot] = np.arange(self.hot_rows, dtype=np.int32)
        return found

    def gpu_bytes(self, row_bytes: int) -> int:
        """What it takes of GPU memory."""
        return padded(self.hot_rows * row_bytes) + (padded(self.rows * SLOT_BYTES) if self.mapped else 0)

    def host_bytes(self, row_bytes: int) -> int:
        """What it takes of page-locked host memory, where a table lies whole or not at all."""
        return 0 if self.whole else padded(self.rows * row_bytes)


def padded(size: int) -> int:
    """A size rounded up to ALIGNMENT."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def choose(rows: Sequence[int], row_bytes: int, budget: int, asked: Sequence[Rows]) -> list[Tier]:
    """A tier for each table of so many rows, within `budget` bytes of GPU memory.

    `asked[t]` are rows that batches asked of table t, as often as they did. The rows that were asked for most are hot,
    ties in the order of tables and rows; where there is room for more, the rows of the smallest tables.
    """
    if sum(padded(count * row_bytes) for count in rows) <= budget:
        return [Tier(count, None) for count in rows]
    room = max(0, budget - sum(padded(count * SLOT_BYTES) + ALIGNMENT for count in rows)) // row_bytes
    found = [np.unique(some, return_counts=True) for some in asked]
    tables = np.repeat(np.arange(len(rows)), [len(some) for some, _ in found])
    numbers = np.concatenate([some for some, _ in found]) if found else np.empty(0, np.int64)
    times = np.concatenate([often for _, often in found]) if found else np.empty(0, np.int64)
    chosen = np.sort(np.argsort(-times, kind="stable")[:room])
    hot = [numbers[chosen[tables[chosen] == table]] for table in range(len(rows))]
    room -= len(chosen)
    for table in sorted(range(len(rows)), key=lambda table: rows[table]):
        if room <= 0:
            break
        # The first rows that are not hot yet: as many as there is room for are among so many.
        there = np.zeros(rows[table], bool)
        there[hot[table]] = True
        more = np.flatnonzero(~there[: room + len(hot[table])])[:room]
        there[more] = True
        hot[table] = np.flatnonzero(there)
        room -= len(more)
    return [Tier(count, some if len(some) < count else None) for count, some in zip(rows, hot, strict=True)]
