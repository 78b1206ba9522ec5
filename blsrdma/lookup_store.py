"""The tables that a rank owns, in up to two versions: where their rows lie, and what keeps them there.

In put mode rows are used where the caller has them, in GPU memory too (blsrdma.gpu.tables). Where others may read them
they are copied into an arena, which begins with the owner's token and a line that says which version lies in each of
its places (native/versions.h); the first place follows, and with the setting `updates` a second one of the same size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from blsrdma.errors import SettingsError, VersionError
from blsrdma.gpu.tables import GpuTables, gpu_rows
from blsrdma.lookup_tables import Rows, address, describe
from blsrdma.windows import LINE_BYTES, round_up

if TYPE_CHECKING:
    from collections.abc import Mapping

    from blsrdma.gpu.tables import GpuRows
    from blsrdma.lookup_tables import Array, Matrix, TableFacts
    from blsrdma.ucx import native

_HEAD_BYTES = 2 * LINE_BYTES


class OwnTables:
    """`facts`: of each of the rank's own tables, in the order of their numbers. `gpu`: those in GPU memory, if any.
    Raises SettingsError."""

    def __init__(self, tables: Mapping[int, Rows | Array], rank: int) -> None:
        self.facts: list[TableFacts] = []
        self._first: list[Matrix] = []
        self._end = _HEAD_BYTES
        self._on_gpu: dict[int, GpuRows] = {}  # not known yet to be complete
        for table, rows in sorted(tables.items()):
            facts, data = self._describe(table, rank, rows)
            self.facts.append(replace(facts, offset=self._end))
            self._first.append(data)
            self._end += round_up(facts.nbytes, LINE_BYTES)
        self.gpu = GpuTables(self._on_gpu) if self._on_gpu else None
        self._arena: native.Arena | None = None
        self._kept: list[dict[int, tuple[int, object]]] = [{}, {}]  # of each place: addresses, and what lies there

    def arena_bytes(self, places: int) -> int:
        """Of an arena for so many versions."""
        return _HEAD_BYTES + places * (self._end - _HEAD_BYTES)

    def open(self, arena: native.Arena | None) -> None:
        """Put the first version into place 0: of `arena`, where there is one."""
        self._arena = arena
        self.store(0, self._first)
        self._first = []

    def store(self, place: int, rows: list[Matrix]) -> None:
        """Put rows into a place: copied into the arena, or where they are."""
        self._kept[place] = {}
        memory = None if self._arena is None else self._arena.array()
        for facts, each in zip(self.facts, rows, strict=True):
            if self._arena is None or memory is None:
                self._kept[place][facts.table] = address(each), each
                continue
            start = facts.offset + place * (self._end - _HEAD_BYTES)
            view = memory[start : start + facts.nbytes]
            view[:] = np.asarray(each).reshape(-1).view(np.uint8)
            self._kept[place][facts.table] = self._arena.address + start, view

    def drop(self, place: int) -> None:
        """What lies there is not needed any more."""
        self._kept[place] = {}

    def address(self, place: int, table: int) -> int:
        """Of a table's rows; 0 for one that is another rank's."""
        return self._kept[place].get(table, (0, None))[0]

    def alike(self, tables: Mapping[int, Rows | Array], rank: int) -> list[Matrix]:
        """The rows of another version, in the order of `facts`. Raises VersionError unless they are the same tables;
        GpuError where a GPU has failed."""
        if self.gpu is not None and (failed := self.gpu.failure()):
            raise failed
        wanted = {facts.table: facts for facts in self.facts}
        self._on_gpu = {}
        if tables.keys() != wanted.keys():
            raise VersionError(
                f"a version of the tables {sorted(tables)}: this rank owns {sorted(wanted)}, and needs all of them"
            )
        rows = []
        for table, facts in wanted.items():
            try:
                found, data = self._describe(table, rank, tables[table])
            except SettingsError as error:
                raise VersionError(str(error)) from None
            if replace(found, offset=facts.offset) != facts:
                raise VersionError(
                    f"table {table}: {found.rows} x {found.dim} {found.format} rows{_where(found)}, where its first "
                    f"version has {facts.rows} x {facts.dim} {facts.format}{_where(facts)}"
                )
            rows.append(data)
        if self.gpu is not None and any(each.device not in (None, self.gpu.device) for each in self._on_gpu.values()):
            raise VersionError(f"tables {self.gpu.numbers} are on GPU {self.gpu.device}, and have to stay on it")
        return rows

    def settle(self, timeout: float) -> None:
        """Wait until rows in GPU memory that were described are complete. Raises GpuError."""
        if self.gpu is not None:
            self.gpu.settle(list(self._on_gpu.values()), timeout)
        self._on_gpu = {}

    def _describe(self, table: int, rank: int, rows: Rows | Array) -> tuple[TableFacts, Matrix]:
        given = rows if isinstance(rows, Rows) else Rows(rows)
        if found := gpu_rows(table, given.data):
            self._on_gpu[table] = found
            given = replace(given, data=found.array)
        return describe(table, rank, given)


def _where(facts: TableFacts) -> str:
    return " on a GPU" if facts.gpu else ""
