"""Pooled lookups on a GPU (pool.cu): bags of several tables, written where the messages to their readers lie.

The owner of tables pools for everybody: `destinations` are one message for each rank, in a send buffer or in the peer's
own window, mapped. A requester that reads others' tables (mode get) names their addresses in its tables, and has one
destination. Rows lie in GPU memory, or the hot ones do and the others are read from page-locked host memory; the bits
are those of the CPU's kernels either way (see native/pool.h; NaN may have other bits).

Expected of an H100, and not measured yet: with rows of 512 bytes a warp has eight of them on their way, and 24 warps
fit on a multiprocessor, which makes up to 96 KiB in flight where some 20 to 40 are needed to keep memory busy. So
lookups of dim 128 should be bound by memory: 0.8 and more of what a device-to-device copy reaches, in bytes of
`bytes_moved`. Where they are not, `python -m bench.gpu.tune` tries other ways to compile and cut the same kernel.
"""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from blsrdma.errors import BagsError, GpuError, SettingsError
from blsrdma.gpu import compiler
from blsrdma.lookup_tables import FORMATS, RowFormat, row_bytes
from blsrdma.settings import timeout_ns

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from blsrdma._native import cuda

SOURCE = Path(__file__).with_name("pool.cu")
THREADS = 128  # of a block, as pool.cu bounds them
TABLES, DESTINATIONS = 40, 64  # of one launch: what its arguments have room for
LOADS = {"fp32": 16, "fp16": 8, "int8": 4, "int4": 2}  # bytes of 4 elements, which are read at once
WARPS_WANTED = 8192  # before a warp gets several bags
NOTED = 64  # launches whose errors are told apart


@dataclass(frozen=True)
class GpuTable:
    """Rows of a table, where a GPU can read them. Addresses are the device's.

    `hot` has `hot_rows` rows. Without `slots` these are the first ones of `rows`; with it (int32 [rows], in device
    memory) row r is at hot + slots[r] rows where slots[r] is from 0 to hot_rows - 1. Other rows are at `cold` + r rows.
    They are rows `first` to `first` + `rows` of `all_rows`; the table's other rows are someone else's, and add nothing.
    """

    table: int  # its number, for errors
    rows: int
    hot: int
    hot_rows: int | None = None  # None: all
    cold: int = 0
    slots: int = 0
    first: int = 0
    all_rows: int | None = None  # None: there are no other rows than these
    mean: bool = False  # divide by the lengths of bags; not where rows are someone else's
    position: int | None = None  # of its vector among a sample's; None: its place in the list


@dataclass(frozen=True)
class GpuBags:
    """The bags of a batch, of all tables of a lookup. Addresses are the device's; indices and offsets are int64.

    Bag s of the t-th table has the indices from b + offsets[t * stride + s] up to b + offsets[t * stride + s + 1],
    where b is 0, or firsts[t]. So offsets may be one list over all tables, [tables * samples + 1] with a stride of
    `samples`; or each table's own, [tables, samples + 1], with a stride of samples + 1 and `firsts` int64 [tables].
    A bag, and the bags that one group of threads takes (at most 32), have less than 2^31 lookups.
    """

    samples: int
    indices: int
    count: int  # of all indices
    offsets: int
    stride: int
    firsts: int = 0
    weights: int = 0  # float32 [count], or none

    @property
    def average(self) -> float:
        """Lookups per sample, of all tables."""
        return self.count / max(1, self.samples)


class _Table(ctypes.Structure):
    _fields_ = (
        ("hot", ctypes.c_uint64),
        ("cold", ctypes.c_uint64),
        ("slots", ctypes.c_uint64),
        ("first", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("all", ctypes.c_int64),
        ("hot_rows", ctypes.c_int64),
        ("position", ctypes.c_int32),
        ("mean", ctypes.c_int32),
    )


class _Tables(ctypes.Structure):
    _fields_ = (("table", _Table * TABLES),)


class _Bags(ctypes.Structure):
    _fields_ = (
        ("indices", ctypes.c_uint64),
        ("weights", ctypes.c_uint64),
        ("offsets", ctypes.c_uint64),
        ("firsts", ctypes.c_uint64),
        ("count", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("begin", ctypes.c_int64),
        ("end", ctypes.c_int64),
        ("message_tables", ctypes.c_int64),
        ("spare", ctypes.c_uint64),
        ("errors", ctypes.c_uint64),
        ("failed", ctypes.c_uint64),
        ("dim", ctypes.c_int32),
        ("lanes", ctypes.c_int32),
        ("slices", ctypes.c_int32),
        ("run", ctypes.c_int32),
        ("first_table", ctypes.c_int32),
    )


class _Destinations(ctypes.Structure):
    _fields_ = (
        ("to", ctypes.c_uint64 * DESTINATIONS),
        ("start", ctypes.c_int64 * (DESTINATIONS + 1)),
        ("count", ctypes.c_int32),
    )


@dataclass
class _Note:
    """What `check` needs to say which bag of a launch was bad."""

    failed: ctypes.c_int32  # in host memory that kernels write, when something is wrong and only then
    done: cuda.Event
    launch: int = -1
    bags: GpuBags | None = None


class PooledLookup:
    """Tables of one row format and dim on a GPU, and the kernels that pool bags of them.

    Parameters:
        device: see blsrdma.gpu.device.open_device.
        tables: at least one. Their memory belongs to the lookup until it is closed.
        dim: elements of a row. Fastest: multiples of 4, with all addresses aligned to LOADS and messages to 16 bytes.
        format: of the rows, as of a Lookup.
        message_tables: vectors per sample in a message, where others write to it, too. None: as many as tables.
        macros, run: to try what others cost: macros for pool.cu, and the bags that a group of lanes takes.

    One thread at a time calls it. Raises SettingsError for tables that cannot be; CompileError when a kernel is first
    used and cannot be compiled.
    """

    def __init__(
        self,
        device: cuda.Device,
        tables: Sequence[GpuTable],
        dim: int,
        format: RowFormat = "fp32",  # noqa: A002 - the word for it everywhere
        message_tables: int | None = None,
        macros: Mapping[str, str | int] | None = None,
        run: int | None = None,
    ) -> None:
        self.tables, self.dim, self.format = tuple(tables), dim, format
        self.message_tables = len(tables) if message_tables is None else message_tables
        if not tables or dim < 1:
            raise SettingsError(f"a lookup of {len(tables)} tables of dim {dim}: at least one of each")
        for place, table in enumerate(tables):
            _check(table, place, self.message_tables)
        self._device, self._macros, self._run = device, dict(macros or {}), run
        self._aligned = dim % 4 == 0 and all(
            address % LOADS[format] == 0 for table in tables for address in (table.hot, table.cold)
        )
        self._arguments = [self._describe(start) for start in range(0, len(tables), TABLES)]
        self._functions: dict[tuple[bool, int], cuda.Function] = {}
        nothing = ctypes.create_string_buffer(row_bytes(format, dim))
        self._spare = device.memory(len(nothing))  # lanes read it where there is no row to add
        device.copy(self._spare.address, ctypes.addressof(nothing), len(nothing))
        self._errors, self._failed = device.memory(NOTED * 16), device.host_memory(NOTED * 4)
        device.fill(self._errors.address, 0xFF, NOTED * 16)
        where = self._failed.host
        self._notes = [_Note(ctypes.c_int32.from_address(where + 4 * n), device.event()) for n in range(NOTED)]
        for note in self._notes:
            note.failed.value = 0
        self._launches = 0
        if not device.synchronize(0, 60_000_000_000):
            raise GpuError("a copy of some bytes to the GPU took longer than 60 s")

    def idle(self, timeout: float) -> bool:
        """Wait until all launches are done, the bad ones too; False after so many seconds."""
        end = time.monotonic() + timeout
        used = [note for note in self._notes if note.launch >= 0]
        return all(self._device.finish(note.done, timeout_ns(max(0.0, end - time.monotonic()))) for note in used)

    def close(self) -> None:
        """Give back the memory that it took for itself. No launch may be in progress."""
        self._spare.close()
        self._errors.close()
        self._failed.close()

    def launch(self, bags: GpuBags, destinations: Sequence[int], starts: Sequence[int], stream: int = 0) -> int:
        """Pool `bags` behind what is on the stream. Returns the number of the launch, for `check`.

        `destinations` are addresses of messages, float32 [samples, message_tables, dim]; the q-th is for the samples
        from starts[q] to starts[q + 1]: `starts` has one element more, and rises from 0 to bags.samples. Asynchronous:
        the bags must remain until it has been checked. Not while the stream is captured for a graph.
        """
        _check_starts(bags, destinations, starts)
        if bags.samples * shape(self.dim, 1)[1] >= 1 << 31:  # groups are numbered by 32 bits
            raise BagsError(f"{bags.samples} samples of dim {self.dim} are too many", self.tables[0].table)
        number = self._launches
        place = number % NOTED
        note = self._notes[place]
        self.check(number - NOTED)
        self._launches += 1
        note.launch, note.bags = number, bags
        aligned = self._aligned and all(address % 16 == 0 for address in destinations)
        function = self._function(bool(bags.weights), 4 if aligned else 1)
        lanes, slices = shape(self.dim, 4 if aligned else 1)
        run = self._run or bags_per_group(
            bags.average / len(self.tables), bags.samples * len(self.tables), lanes, slices
        )
        for first in range(0, len(destinations), DESTINATIONS):
            some = min(DESTINATIONS, len(destinations) - first)
            begin, end = starts[first], starts[first + some]
            if begin == end:
                continue
            to = _Destinations(
                (ctypes.c_uint64 * DESTINATIONS)(*destinations[first : first + some]),
                (ctypes.c_int64 * (DESTINATIONS + 1))(*starts[first : first + some + 1]),
                some,
            )
            groups = -(-(end - begin) // run) * slices
            blocks = -(-groups // (THREADS // lanes))
            for part, tables in enumerate(self._arguments):
                before = part * TABLES
                what = _Bags(
                    bags.indices, bags.weights, bags.offsets, bags.firsts, bags.count, bags.stride, begin, end,
                    self.message_tables, self._spare.address, self._errors.address + 16 * place,
                    self._failed.address + 4 * place, self.dim, lanes, slices, run, before,
                )  # fmt: skip
                count = min(TABLES, len(self.tables) - before)
                function.launch((blocks, count, 1), (THREADS, 1, 1), 0, stream, [what, tables, to])
        self._device.record(note.done, stream)
        return number

    def check(self, launch: int, timeout: float = 60.0) -> None:
        """Wait until a launch is done; raise BagsError where it found an index that is no row, and added nothing.

        Costs little. A launch that nobody checks is checked when its place is needed again, NOTED launches later.
        Raises GpuError when it is not done after `timeout` seconds.
        """
        note = self._notes[launch % NOTED]
        if note.launch != launch or note.bags is None:
            return
        if not self._device.finish(note.done, timeout_ns(timeout)):
            raise GpuError(f"launch {launch} of a pooled lookup is not done after {timeout:g} s")
        bags, note.bags = note.bags, None
        if note.failed.value:
            note.failed.value = 0
            words = self._errors.address + 16 * (launch % NOTED)
            index, offset = self._read(words, 2)
            self._device.fill(words, 0xFF, 16)
            raise self._error(bags, index, offset)

    def _error(self, bags: GpuBags, index: int, offset: int) -> BagsError:
        """In words; reads what is needed for them back from the device, behind everything on its null stream."""
        if offset >= 0:
            place, position = divmod(offset, bags.stride)
            if place == len(self.tables) or (bags.stride == bags.samples and position == 0 and place):
                place, position = place - 1, position + bags.samples
            number, value = self.tables[place].table, self._read(bags.offsets + 8 * offset, 1)[0]
            return BagsError(
                f"table {number}: offset {value} at position {position} is less than the one before it, or beyond the "
                f"{bags.count} indices",
                number, position, value,
            )  # fmt: skip
        for place, table in enumerate(self.tables):
            first = self._read(bags.firsts + 8 * place, 1)[0] if bags.firsts else 0
            ends = self._read(bags.offsets + 8 * place * bags.stride, bags.samples + 1)
            if first + ends[0] <= index < first + ends[-1]:
                sample = sum(first + end <= index for end in ends) - 1
                size = table.rows if table.all_rows is None else table.all_rows
                value, position = (
                    self._read(bags.indices + 8 * index, 1)[0],
                    index - (first if bags.firsts else ends[0]),
                )
                return BagsError(
                    f"table {table.table}: index {value} at position {position} (sample {sample}) is not a row of a "
                    f"table of {size} rows",
                    table.table, position, value,
                )  # fmt: skip
        return BagsError(f"the index at position {index} of all is not a row", self.tables[0].table, index)

    def _read(self, address: int, count: int) -> list[int]:
        words = (ctypes.c_int64 * count)()
        self._device.copy(ctypes.addressof(words), address, 8 * count)
        if not self._device.synchronize(0, 60_000_000_000):
            raise GpuError("a copy of some bytes from the GPU took longer than 60 s")
        return list(words)

    def _function(self, weighted: bool, elements: int) -> cuda.Function:
        key = (weighted, elements)
        if key not in self._functions:
            macros = defines(self.format, weighted, elements) | self._macros
            image = compiler.compiled(SOURCE, macros, self._device.capability).image
            self._functions[key] = self._device.module(image).function("pool")
        return self._functions[key]

    def _describe(self, start: int) -> _Tables:
        found = _Tables()
        for place, table in enumerate(self.tables[start : start + TABLES]):
            found.table[place] = _Table(
                table.hot,
                table.cold,
                table.slots,
                table.first,
                table.rows,
                table.rows if table.all_rows is None else table.all_rows,
                table.rows if table.hot_rows is None else table.hot_rows,
                start + place if table.position is None else table.position,
                table.mean,
            )
        return found


def defines(format: RowFormat, weighted: bool, elements: int) -> dict[str, str | int]:  # noqa: A002
    """The macros for one kernel of pool.cu; it reads `elements` (4 or 1) of a row at once."""
    return {
        "POOL_FORMAT": f"kF{format[1:]}" if format.startswith("fp") else f"kI{format[1:]}",
        "POOL_WEIGHTED": "true" if weighted else "false",
        "POOL_ELEMENTS": elements,
    }


def shape(dim: int, elements: int) -> tuple[int, int]:
    """Lanes that take a bag together (a power of 2, from 8 to 32), and the slices of a row that so many lanes read."""
    columns = -(-dim // elements)
    lanes = min(32, max(8, 1 << (columns - 1).bit_length()))
    return lanes, -(-columns // lanes)


def bags_per_group(average: float, bags: int, lanes: int, slices: int) -> int:
    """Neighbouring bags that a group of lanes takes: about 32 rows, as far as there are enough bags for all warps."""
    for_rows = round(32 / max(average, 1.0))
    for_warps = bags * slices * lanes // (32 * WARPS_WANTED)
    return max(1, min(32, for_rows, for_warps))


def bytes_moved(
    format: RowFormat,  # noqa: A002
    dim: int,
    lookups: int,
    bags: int,
    weighted: bool = False,
    mapped: bool = False,
    distinct: int | None = None,
) -> int:
    """Bytes that a pooled lookup must move: what a share of the memory's bandwidth is counted by.

    Each lookup reads its row, its index, and its weight and slot where there are such (`weighted`, `mapped`); each bag
    an offset; and its vector is written. Caches may hold a row that is looked up again: with `distinct`, the number of
    different rows, each counts once, which is what a perfect cache would leave. The hardware rounds up to sectors of 32
    bytes; that is not counted.
    """
    rows = lookups if distinct is None else distinct
    each = 8 + (4 if weighted else 0) + (4 if mapped else 0)
    return rows * row_bytes(format, dim) + lookups * each + bags * (8 + 4 * dim)


def _check(table: GpuTable, place: int, message_tables: int) -> None:
    where = f"table {table.table}"
    hot = table.rows if table.hot_rows is None else table.hot_rows
    everything = table.rows if table.all_rows is None else table.all_rows
    position = place if table.position is None else table.position
    if table.rows < 0 or table.first < 0 or table.first + table.rows > everything:
        raise SettingsError(f"{where}: rows {table.first} to {table.first + table.rows} of {everything}")
    if hot < 0 or (not table.slots and hot > table.rows):
        raise SettingsError(f"{where}: {hot} hot rows of {table.rows}")
    if hot and not table.hot:
        raise SettingsError(f"{where}: {hot} hot rows, and no address of them")
    if not table.cold and (table.slots or hot < table.rows):
        raise SettingsError(f"{where}: not all of its {table.rows} rows are hot, and there is no address of the others")
    if table.mean and everything != table.rows:
        raise SettingsError(f"{where}: the mean of a part of its rows is its receiver's to take")
    if not 0 <= position < message_tables:
        raise SettingsError(f"{where}: position {position} of {message_tables} in a message")


def _check_starts(bags: GpuBags, destinations: Sequence[int], starts: Sequence[int]) -> None:
    if len(starts) != len(destinations) + 1 or starts[0] != 0 or starts[-1] != bags.samples:
        raise ValueError(
            f"starts of {len(destinations)} destinations: {len(destinations) + 1} numbers from 0 to {bags.samples}, "
            f"not {list(starts)[:8]}"
        )
    if any(stop < start for start, stop in pairwise(starts)):
        raise ValueError("starts of destinations must not fall")


assert FORMATS == ("fp32", "fp16", "int8", "int4")  # as pool.cu numbers them
assert ctypes.sizeof(_Table) == 64
