"""Placements by what tables cost: rows of memory, and lookups counted in a sample of the data; the same on every rank.

A plan balances two shares at once, of the bytes and of the lookup time, since either can be what a rank runs out of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dlrm import placement as placements
from dlrm.errors import OptionError
from dlrm.placement import Piece, Placement, split

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dlrm.data.batch import Batch
    from dlrm.kernels import Kernel

SAMPLE_LOOKUPS = 4096  # samples of the data that lookups are counted in
# Of one core, in nanoseconds: per bag, per row, and per byte of a row (26 tables of 100,000 rows, dim 64, fp32).
BAG_NS, ROW_NS, BYTE_NS = 3.0, 3.0, 0.016


@dataclass(frozen=True)
class Plan:
    """A placement, and what it asks of each rank."""

    placement: Placement
    bytes: tuple[int, ...]  # of stored rows, by rank
    lookups: tuple[float, ...]  # rows per sample of the global batch, by rank
    lookup_ms: tuple[float, ...]  # predicted, for a batch, by rank


@dataclass(frozen=True)
class Costs:
    """Of each table: its stored bytes, and rows looked up for a sample."""

    bytes: tuple[int, ...]
    lookups: tuple[float, ...]
    row_bytes: int

    def nanoseconds(self, table: int) -> float:
        """Predicted lookup time of a table for a sample."""
        return BAG_NS + self.lookups[table] * (ROW_NS + BYTE_NS * self.row_bytes)

    def weights(self) -> list[float]:
        """Share of a table in all bytes, plus its share in all lookup time."""
        times = [self.nanoseconds(table) for table in range(len(self.bytes))]
        return [
            size / max(1, sum(self.bytes)) + time / max(1e-9, sum(times))
            for size, time in zip(self.bytes, times, strict=True)
        ]


def costs(table_rows: Sequence[int], dim: int, kernel: Kernel, batches: Iterable[Batch]) -> Costs:
    """What tables cost, lookups counted over the first SAMPLE_LOOKUPS samples of `batches`."""
    totals, samples = [0] * len(table_rows), 0
    for batch in batches:
        for table, indices in enumerate(batch.indices):
            totals[table] += len(indices)
        samples += batch.size
        if samples >= SAMPLE_LOOKUPS:
            break
    row = kernel.row_bytes(dim)
    return Costs(tuple(rows * row for rows in table_rows), tuple(total / max(1, samples) for total in totals), row)


def place(how: str, table_rows: tuple[int, ...], ranks: int, cost: Costs, row_wise: int, replicate: int) -> Placement:
    """The placement that `how` names: contiguous, greedy, worst, or a file (see `placement.read`).

    Tables of more than `row_wise` rows are cut over all ranks, those of at most `replicate` are on every rank (0:
    none). Raises OptionError.
    """
    tables = len(table_rows)
    if how not in ("contiguous", "greedy", "worst"):
        if row_wise or replicate:
            raise OptionError("--row-wise-above and --replicate-below do not go with a placement from a file")
        found = placements.read(how, tables, ranks)
        found.check(table_rows)
        return found
    replicated = tuple(table for table in range(tables) if ranks > 1 and table_rows[table] <= replicate)
    divided = [table for table in range(tables) if ranks > 1 and row_wise and table_rows[table] > row_wise]
    whole = [table for table in range(tables) if table not in replicated and table not in divided]
    weights = cost.weights()
    if how == "contiguous":
        own = [[whole[position] for position in some] for some in split(len(whole), ranks)]
    elif how == "greedy":
        own = _greedy(whole, weights, ranks)
    else:
        own = _worst(whole, weights, ranks)
    pieces: list[list[Piece]] = [[Piece(table) for table in sorted(some)] for some in own]
    for table in divided:
        for rank, rows in enumerate(split(table_rows[table], ranks)):
            pieces[rank].append(Piece(table, rows))
    if how == "contiguous" and not replicated and not divided:
        return Placement(tables, ranks)
    ordered = tuple(tuple(sorted(some, key=lambda piece: piece.table)) for some in pieces)
    return Placement(tables, ranks, ordered, replicated)


def plan(placement: Placement, table_rows: Sequence[int], cost: Costs, batch_size: int) -> Plan:
    """What `placement` asks of each rank for batches of `batch_size` samples."""
    sizes, lookups, times = [], [], []
    for pieces in placement.pieces:
        shares = [(piece.table, _share(piece, table_rows)) for piece in pieces]
        shares += [(table, 1.0) for table in placement.replicated]
        sizes.append(round(sum(cost.bytes[table] * share for table, share in shares)))
        # A replicated table is looked up for the rank's own samples only.
        parts = [(t, share / placement.ranks if t in placement.replicated else share) for t, share in shares]
        lookups.append(sum(cost.lookups[table] * share for table, share in parts))
        times.append(batch_size * sum(cost.nanoseconds(table) * share for table, share in parts) / 1e6)
    return Plan(placement, tuple(sizes), tuple(lookups), tuple(times))


def _share(piece: Piece, table_rows: Sequence[int]) -> float:
    return 1.0 if piece.rows is None else len(piece.rows) / table_rows[piece.table]


def _greedy(tables: list[int], weights: list[float], ranks: int) -> list[list[int]]:
    """The heaviest table that is left to the rank that has least, ties to the lowest numbers."""
    own: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0.0] * ranks
    for table in sorted(tables, key=lambda table: (-weights[table], table)):
        rank = min(range(ranks), key=lambda rank: (loads[rank], rank))
        own[rank].append(table)
        loads[rank] += weights[table]
    return own


def _worst(tables: list[int], weights: list[float], ranks: int) -> list[list[int]]:
    """One of the lightest tables to each rank but the first, and all others to the first."""
    by_weight = sorted(tables, key=lambda table: (weights[table], table))
    light = by_weight[: max(0, min(ranks - 1, len(tables) - 1))]
    own = [[table] for table in light] + [[] for _ in range(ranks - 1 - len(light))]
    return [by_weight[len(light) :], *own]
