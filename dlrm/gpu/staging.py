"""Batches on their way to a GPU: what a rank needs of them is checked, and written to page-locked memory, from where it
is uploaded as a whole without making the host wait.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from blsrdma.gpu.pooling import GpuBags
from dlrm import bags
from dlrm.data.batch import Batch
from dlrm.gpu.tiers import padded

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from blsrdma.gpu.device import Device, HostMemory
    from dlrm.placement import Placement

GROWTH = 1.25  # of memory that a batch does not fit in


def on_host(memory: HostMemory, count: int, dtype: Any = np.float32) -> NDArray[Any]:
    """Page-locked memory as an array of `count` elements."""
    size = count * np.dtype(dtype).itemsize
    if not size:
        return np.empty(0, dtype)
    return np.frombuffer((ctypes.c_uint8 * size).from_address(memory.host), dtype)


@dataclass(frozen=True)
class Wanted:
    """Which tables' bags of a batch a rank uploads: of all samples, of its own samples, and the lengths of its own."""

    owned: tuple[int, ...]
    replicated: tuple[int, ...]
    divided: tuple[int, ...]  # whose sums become means here

    def upload_bytes(self, batch: Batch, samples: range) -> int:
        """How much that is, with what lies between to align it."""
        mine = len(samples)
        total = padded(4 * mine * batch.dense.shape[1]) + padded(4 * mine * len(self.divided))
        if self.owned:
            total += _bag_bytes(batch, self.owned, 0, batch.size)
        if self.replicated:
            total += _bag_bytes(batch, self.replicated, samples.start, samples.stop)
        return total


@dataclass(frozen=True)
class Uploaded:
    """Where a batch's data are: dense float32 [n, D], bags, lengths float32 [divided tables, n], or 0 for none."""

    dense: int
    owned: GpuBags | None
    replicated: GpuBags | None
    lengths: int

    def moved(self, by: int) -> Uploaded:
        """The same at other addresses."""
        owned, replicated = (one and _moved(one, by) for one in (self.owned, self.replicated))
        return Uploaded(self.dense + by, owned, replicated, self.lengths + by if self.lengths else 0)


@dataclass(frozen=True)
class Staged:
    """A batch in page-locked memory."""

    memory: HostMemory
    nbytes: int  # that are uploaded
    data: Uploaded  # as if memory.host was where it is used
    samples: tuple[range, ...]  # of the batch, by rank
    size: int
    mine: Batch  # this rank's samples; of its bags only what is wanted on the host


class Stager:
    """Stages batches for one rank; memory is used again once it is given back. `means`: tables whose bags' lengths
    are wanted on the host, too."""

    def __init__(
        self, device: Device, rank: int, placement: Placement, table_rows: tuple[int, ...], wanted: Wanted, means: bool
    ) -> None:
        self._device, self._rank, self._placement = device, rank, placement
        self._table_rows, self._wanted = table_rows, wanted
        self._checked = {*wanted.owned, *wanted.replicated}
        self._lengths = {*wanted.divided} if means else set()
        self._all: list[HostMemory] = []
        self._free: list[HostMemory] = []

    def stage(self, batch: Batch) -> Staged:
        """Raises BadIndex."""
        bags.check(batch, self._table_rows, self._checked)
        wanted, samples = self._wanted, self._placement.samples(batch.size)
        own = samples[self._rank]
        memory = self._memory(wanted.upload_bytes(batch, own))
        writer = _Writer(on_host(memory, memory.size, np.uint8), memory.host)
        mine = slice(own.start, own.stop)
        dense = writer.put([batch.dense[mine].numpy()], np.float32)
        divisors = [_lengths(batch, table, mine) for table in wanted.divided]
        lengths = writer.put(divisors, np.float32) if divisors else 0
        owned = _put_bags(writer, batch, wanted.owned, 0, batch.size) if wanted.owned else None
        replicated = None
        if wanted.replicated and own:
            replicated = _put_bags(writer, batch, wanted.replicated, own.start, own.stop)
        kept = batch.slice(own.start, own.stop, self._lengths)
        if not self._lengths:  # the bags are not held: batches that were staged ahead take their memory once
            kept = replace(kept, indices=(), offsets=(), weights=None)
        return Staged(memory, writer.used, Uploaded(dense, owned, replicated, lengths), samples, batch.size, kept)

    def give_back(self, staged: Staged) -> None:
        """What was staged has been uploaded."""
        self._free.append(staged.memory)

    def close(self) -> None:
        """Give all memory back. No upload may be in progress."""
        for memory in self._all:
            memory.close()

    def _memory(self, size: int) -> HostMemory:
        for number, memory in enumerate(self._free):
            if memory.size >= size:
                return self._free.pop(number)
        self._all.append(made := self._device.host_memory(padded(max(1, size))))
        return made


@dataclass
class _Writer:
    """Arrays one after another, each aligned, in memory that begins at `start`."""

    memory: NDArray[np.uint8]
    start: int
    used: int = field(default=0)

    def put(self, arrays: Sequence[NDArray[Any]], dtype: Any) -> int:
        """Write arrays as one; its address."""
        address = self.start + self.used
        for array in arrays:
            size = array.size * np.dtype(dtype).itemsize
            self.memory[self.used : self.used + size].view(dtype)[:] = array.reshape(-1)
            self.used += size
        self.used = padded(self.used)
        return address


def _put_bags(writer: _Writer, batch: Batch, tables: Sequence[int], lo: int, hi: int) -> GpuBags:
    """The bags of samples lo to hi of some tables."""
    ends = [batch.offsets[table].numpy()[lo : hi + 1] for table in tables]
    stretches = [slice(int(some[0]), int(some[-1])) for some in ends]
    sizes = [some.stop - some.start for some in stretches]
    indices = writer.put(
        [batch.indices[table].numpy()[some] for table, some in zip(tables, stretches, strict=True)], np.int64
    )
    offsets = writer.put([some - some[0] if lo else some for some in ends], np.int64)
    firsts = writer.put([np.array([*accumulate(sizes, initial=0)][:-1], np.int64)], np.int64)
    weights = 0
    if batch.weights is not None:
        weights = writer.put(
            [batch.weights[table].numpy()[some] for table, some in zip(tables, stretches, strict=True)], np.float32
        )
    return GpuBags(hi - lo, indices, sum(sizes), offsets, hi - lo + 1, firsts, weights)


def _moved(given: GpuBags, by: int) -> GpuBags:
    return replace(
        given,
        indices=given.indices + by,
        offsets=given.offsets + by,
        firsts=given.firsts + by,
        weights=given.weights + by if given.weights else 0,
    )


def _bag_bytes(batch: Batch, tables: Sequence[int], lo: int, hi: int) -> int:
    lookups = sum(int(batch.offsets[table][hi]) - int(batch.offsets[table][lo]) for table in tables)
    weights = 0 if batch.weights is None else padded(4 * lookups)
    return padded(8 * lookups) + weights + padded(8 * len(tables) * (hi - lo + 1)) + padded(8 * len(tables))


def _lengths(batch: Batch, table: int, mine: slice) -> NDArray[np.float32]:
    ends = batch.offsets[table].numpy()[mine.start : mine.stop + 1]
    return np.maximum(np.diff(ends), 1).astype(np.float32)
