"""Who owns what: tables, or rows of them, and samples.

Samples, and tables unless a plan says otherwise, follow the reference's rule (extend_distributed.py): contiguous
blocks, the first `total % parts` ranks with one more than the others. With more ranks than tables, or than samples, the
last ranks get nothing, and still take part in every exchange.

A table is whole at one rank, or cut by rows over several (each sends partial sums, which the receiver adds in rank
order: the same bits in every run of one placement, other bits than those of the whole table), or replicated: every
rank has all of it and looks its own samples up.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from dlrm.errors import OptionError


def split(total: int, parts: int) -> tuple[range, ...]:
    """Cut range(total) into `parts` contiguous ranges whose lengths differ by at most one, the longer ones first."""
    size, longer = divmod(total, parts)
    starts = [part * size + min(part, longer) for part in range(parts + 1)]
    return tuple(range(lo, hi) for lo, hi in itertools.pairwise(starts))


@dataclass(frozen=True)
class Piece:
    """A table, or the rows `rows` of it."""

    table: int
    rows: range | None = None

    def __str__(self) -> str:
        return str(self.table) if self.rows is None else f"{self.table}:{self.rows.start}-{self.rows.stop}"


@dataclass(frozen=True)
class Run:
    """`count` neighbours of a part, from `position` on, are the tables from `table` on; `add`: to what is there."""

    part: int
    position: int
    table: int
    count: int
    add: bool = False


@dataclass(frozen=True)
class Placement:
    """Tables and samples of a model with `num_tables` tables over `ranks` ranks; `pieces` None: contiguous blocks."""

    num_tables: int
    ranks: int
    given: tuple[tuple[Piece, ...], ...] | None = None
    replicated: tuple[int, ...] = ()

    @cached_property
    def pieces(self) -> tuple[tuple[Piece, ...], ...]:
        """What each rank owns and sends, by rank, in the order of its messages."""
        if self.given is not None:
            return self.given
        return tuple(tuple(Piece(table) for table in tables) for tables in split(self.num_tables, self.ranks))

    @property
    def tables(self) -> tuple[tuple[int, ...], ...]:
        """The tables of which each rank owns something, by rank."""
        return tuple(tuple(piece.table for piece in pieces) for pieces in self.pieces)

    @cached_property
    def divided(self) -> tuple[int, ...]:
        """The tables that are cut by rows."""
        return tuple(sorted({piece.table for pieces in self.pieces for piece in pieces if piece.rows is not None}))

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Where what arrives belongs: a part for each owner in rank order, then one of the replicated tables."""
        found: list[Run] = []
        seen: set[int] = set()
        for part, tables in enumerate((*self.tables, self.replicated)):
            for position, table in enumerate(tables):
                last = found[-1] if found else None
                add = table in seen
                seen.add(table)
                if (
                    last is not None
                    and (last.part, last.position + last.count) == (part, position)
                    and last.table + last.count == table
                    and last.add == add
                ):
                    found[-1] = Run(last.part, last.position, last.table, last.count + 1, add)
                else:
                    found.append(Run(part, position, table, 1, add))
        return tuple(found)

    def samples(self, batch_size: int) -> tuple[range, ...]:
        """The samples of a batch (as positions in it) each rank predicts, by rank; some may be empty."""
        return split(batch_size, self.ranks)

    def largest_message(self, batch_size: int, dim: int) -> int:
        """Bytes of the largest message any rank sends to another for batches up to `batch_size` samples (fp32)."""
        return max(map(len, self.samples(batch_size))) * max(map(len, self.pieces)) * dim * 4

    def check(self, table_rows: tuple[int, ...]) -> None:
        """Raise OptionError where a row of a table has not just one owner (or is not replicated)."""
        owned: dict[int, list[range]] = {table: [] for table in range(self.num_tables)}
        for table in self.replicated:
            self._known(table)
            owned[table].append(range(table_rows[table]))
        for rank, pieces in enumerate(self.pieces):
            if len({piece.table for piece in pieces}) != len(pieces):
                raise OptionError(f"placement: rank {rank} has a table more than once")
            for piece in pieces:
                self._known(piece.table)
                owned[piece.table].append(range(table_rows[piece.table]) if piece.rows is None else piece.rows)
        for table, parts in owned.items():
            parts.sort(key=lambda part: (part.start, part.stop))
            at = 0
            for part in parts:
                if part.start != at:
                    raise OptionError(f"placement: table {table}: row {min(at, part.start)} has not just one owner")
                at = part.stop
            if at != table_rows[table]:
                raise OptionError(f"placement: table {table}: rows end at {at}, the table has {table_rows[table]}")

    def _known(self, table: int) -> None:
        if not 0 <= table < self.num_tables:
            raise OptionError(f"placement: table {table}, but the model has {self.num_tables} tables")

    def as_json(self) -> dict[str, Any]:
        """What `read` reads."""
        return {
            "ranks": [[str(piece) for piece in pieces] for pieces in self.pieces],
            "replicated": list(self.replicated),
        }


def read(path: str | Path, num_tables: int, ranks: int) -> Placement:
    """A placement from a JSON file: {"ranks": [["0", "1"], ["2:0-500"], ...], "replicated": [3]}; see `Piece`."""
    try:
        found = json.loads(Path(path).read_text())
        pieces = tuple(tuple(_piece(str(text)) for text in own) for own in found["ranks"])
        replicated = tuple(int(table) for table in found.get("replicated", []))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise OptionError(f"--placement {path}: cannot be read as a placement: {error}") from error
    if len(pieces) != ranks:
        raise OptionError(f"--placement {path}: is for {len(pieces)} ranks, this run has {ranks}")
    return Placement(num_tables, ranks, pieces, replicated)


def _piece(text: str) -> Piece:
    table, colon, rows = text.partition(":")
    if not colon:
        return Piece(int(table))
    lo, hi = rows.split("-")
    return Piece(int(table), range(int(lo), int(hi)))
