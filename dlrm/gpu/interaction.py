"""The interaction on a GPU (interaction.cu): from where pooled vectors have arrived straight to the top MLP's input.

Vectors that several ranks have parts of are added, and means taken, in the order and with the bits of the CPU's
(`dense.DenseSlice.predict`). A product of two of them is one chain of fused multiply-adds in column order: off from the
exact one by at most dim u / (1 - dim u) sum |x y|, where u is 2^-24. It depends on nothing but the two vectors: not on
the batch, nor on where the sample sits in it.

Expected of an H100, and not measured yet: with 27 vectors of 128 elements a sample takes 13.8 KB of reads and 1.9 KB
of writes, some 5 ns of its memory's time, and as many of the shared memory's; 13 samples fit on a multiprocessor, so
reading and multiplying overlap.
"""

from __future__ import annotations

import ctypes
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from blsrdma.errors import GpuError
from blsrdma.gpu import compiler
from dlrm.errors import OptionError
from dlrm.shape import interaction_width

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from blsrdma._native import cuda
    from dlrm.placement import Placement, Run
    from dlrm.shape import ModelShape

SOURCE = Path(__file__).with_name("interaction.cu")
PARTS = 384  # messages that one launch reads: what its arguments have room for
MOST_THREADS = 256  # of a block, as interaction.cu bounds them
FREE_SHARED = 48 << 10  # bytes of shared memory that a block has without asking
# Bytes that it can ask for, by compute capability.
SHARED = {(8, 0): 163 << 10, (8, 7): 163 << 10, (8, 6): 99 << 10, (8, 9): 99 << 10, (9, 0): 227 << 10}
SHARED |= {(10, 0): 227 << 10, (10, 3): 227 << 10, (12, 0): 99 << 10, (12, 1): 99 << 10}


class _Work(ctypes.Structure):
    _fields_ = (
        ("bottom", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("sources", ctypes.c_uint64),
        ("firsts", ctypes.c_uint64),
        ("tables", ctypes.c_uint64),
        ("means", ctypes.c_uint64),
        ("lengths", ctypes.c_uint64),
        ("samples", ctypes.c_int64),
        ("bottom_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("features", ctypes.c_int32),
        ("dim", ctypes.c_int32),
        ("columns", ctypes.c_int32),
        ("stride", ctypes.c_int32),
        ("itself", ctypes.c_int32),
        ("staged", ctypes.c_int32),
    )


class _Parts(ctypes.Structure):
    _fields_ = (("at", ctypes.c_uint64 * PARTS),)


class GpuInteraction:
    """The interaction ("dot" or "cat") of a model whose pooled vectors come from where a placement says.

    Parameters:
        device: see blsrdma.gpu.device.open_device.
        shared_bytes: shared memory for a block; None: what the device has.

    Raises OptionError where tables have no place, or there are more than PARTS parts.
    """

    def __init__(
        self, device: cuda.Device, shape: ModelShape, placement: Placement, shared_bytes: int | None = None
    ) -> None:
        self._device, self.dim, self.interaction, self._itself = device, shape.dim, shape.interaction, shape.itself
        self.features = shape.num_tables + 1
        self.width = interaction_width(shape.num_tables, shape.dim, shape.interaction, shape.itself)
        self._widths = [len(pieces) for pieces in placement.pieces]
        self._widths += [len(placement.replicated)] if placement.replicated else []
        if len(self._widths) > PARTS:
            raise OptionError(f"{len(self._widths)} parts of pooled vectors: one launch reads at most {PARTS}")
        sources = _sources(placement.runs, shape.num_tables)
        self.vectors = sum(map(len, sources))  # that a sample's are made of, without the bottom MLP's output
        firsts = [0, *accumulate(map(len, sources))]
        of_lengths = {table: number for number, table in enumerate(placement.divided)}
        lists = (
            [word for of_table in sources for source in of_table for word in source],
            firsts,
            self._widths,
            [of_lengths.get(table, -1) for table in range(shape.num_tables)],
        )
        self._memory, self._addresses = _uploaded(device, lists)
        limit = shared_bytes or SHARED.get(device.capability, FREE_SHARED)
        products = self.width - shape.dim if shape.interaction == "dot" else 0
        self._columns, self._stride, self._staged, self._shared = plan(self.features, shape.dim, products, limit)
        self._functions: dict[int, cuda.Function] = {}

    def close(self) -> None:
        """Give back its memory. No launch may be in progress."""
        self._memory.close()

    def launch(
        self,
        samples: int,
        bottoms: int,
        parts: Sequence[int],
        lengths: int,
        features: int,
        stream: int,
        bottom_stride: int | None = None,
        feature_stride: int | None = None,
    ) -> None:
        """Write the top MLP's input for `samples` samples behind what is on the stream. Asynchronous.

        Addresses are the device's; everything is float32. `bottoms` [samples, bottom_stride]: the bottom MLP's output
        in the first `dim` columns. `parts`: [samples, tables of it, dim], one for each owner in rank order, then one of
        the replicated tables where there are such. `lengths` [divided tables, samples]: what the sums of tables that
        are cut by rows are divided by; 0: they stay sums. `features` [samples, feature_stride]: the first `width`
        columns are written, the others zeroed. Strides are in elements; None: no gap.
        """
        bottom_stride = self.dim if bottom_stride is None else bottom_stride
        feature_stride = self.width if feature_stride is None else feature_stride
        if len(parts) != len(self._widths):
            raise ValueError(f"{len(parts)} parts, wanted {len(self._widths)}")
        if bottom_stride < self.dim or feature_stride < self.width:
            raise ValueError(f"strides {bottom_stride}, {feature_stride}: at least {self.dim}, {self.width}")
        if not samples:
            return
        aligned = self.dim % 4 == 0 and bottom_stride % 4 == 0 and all(at % 16 == 0 for at in (bottoms, *parts))
        work = _Work(
            bottoms, features, *self._addresses, lengths, samples, bottom_stride, feature_stride, self.features,
            self.dim, self._columns, self._stride, self._itself, self._staged,
        )  # fmt: skip
        arguments = [work, _Parts((ctypes.c_uint64 * PARTS)(*parts))]
        dot = self.interaction == "dot"
        threads = threads_for(self.features) if dot else MOST_THREADS
        function = self._function(4 if aligned else 1)
        function.launch((samples, 1, 1), (threads, 1, 1), self._shared if dot else 0, stream, arguments)

    def _function(self, elements: int) -> cuda.Function:
        if elements not in self._functions:
            macros = defines(elements, tile(self.features))
            image = compiler.compiled(SOURCE, macros, self._device.capability).image
            function = self._device.module(image).function(self.interaction)
            if self.interaction == "dot" and self._shared > FREE_SHARED:
                function.allow_shared(self._shared)
            self._functions[elements] = function
        return self._functions[elements]


def defines(elements: int, tile: int) -> dict[str, str | int]:
    """The macros for interaction.cu: columns read at once (4 or 1), and products per side of a thread's square."""
    return {"INTERACTION_ELEMENTS": elements, "INTERACTION_TILE": tile}


def tile(features: int) -> int:
    """Products per side of a thread's square: as many as leave most threads of a warp with one."""
    return 4 if features > 20 else 2 if features > 10 else 1


def threads_for(features: int) -> int:
    """Threads of a block: one for each pair of classes of vectors, up to MOST_THREADS, in whole warps."""
    classes = -(-features // tile(features))
    return min(MOST_THREADS, -(-(classes * (classes + 1) // 2) // 32) * 32)


def plan(features: int, dim: int, products: int, limit: int) -> tuple[int, int, bool, int]:
    """What a block has in shared memory: columns at a time, floats from one vector to the next, whether the products
    are gathered there, and bytes of all. The distance is an odd number of 16 bytes: neighbours lie in other banks.

    Raises OptionError where not even four columns of so many vectors fit.
    """

    def stride_of(columns: int) -> int:
        groups = -(-columns // 4)
        return 4 * (groups + 1 - groups % 2)

    for staged in (True, False):
        room = limit - 4 * products * staged
        for columns in (dim, *range(min(512, dim) // 32 * 32, 0, -32), 4):
            if columns <= dim and features * stride_of(columns) * 4 <= room:
                return columns, stride_of(columns), staged, features * stride_of(columns) * 4 + 4 * products * staged
    raise OptionError(f"the interaction of {features} vectors does not fit in {limit} bytes of shared memory")


def bytes_moved(interaction: GpuInteraction, samples: int, feature_stride: int | None = None) -> int:
    """Bytes that an interaction must move: every vector that arrived, and the bottom MLP's output, is read once, and
    the top MLP's input is written. (Where a thread has several tiles, and shared memory only some columns, vectors are
    read more often: that is not counted.)"""
    read = (interaction.vectors + 1) * interaction.dim
    return 4 * samples * (read + (interaction.width if feature_stride is None else feature_stride))


def _sources(runs: Iterable[Run], num_tables: int) -> list[list[tuple[int, int]]]:
    """(part, position) of all that is added up to a table's vector, for each table, in the order of the runs."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(num_tables)]
    for run in runs:
        for number in range(run.count):
            found[run.table + number].append((run.part, run.position + number))
    missing = [table for table, of_table in enumerate(found) if not of_table]
    if missing:
        raise OptionError(f"placement: no rank has anything of table {missing[0]}")
    return found


def _uploaded(device: cuda.Device, lists: Sequence[Sequence[int]]) -> tuple[cuda.Memory, list[int]]:
    """Lists of int32 in one piece of device memory, and where each of them lies there."""
    words = [word for each in lists for word in each]
    host = (ctypes.c_int32 * max(1, len(words)))(*words)
    memory = device.memory(ctypes.sizeof(host))
    device.copy(memory.address, ctypes.addressof(host), ctypes.sizeof(host))
    if not device.synchronize(0, 60_000_000_000):
        raise GpuError("a copy of some bytes to the GPU took longer than 60 s")
    addresses, at = [], memory.address
    for each in lists:
        addresses.append(at)
        at += 4 * len(each)
    return memory, addresses
