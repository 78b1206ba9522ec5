"""Memory of the batches that are on their way on one rank: what is uploaded of them, and what comes back.

A slot is one batch's from its start until its predictions have been handed out, when nothing on the device uses it any
more: so it is filled again without waiting for anything.
"""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import numpy as np

from blsrdma.gpu.pooling import GpuBags
from dlrm.gpu.tiers import padded

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from blsrdma.gpu.device import Device, HostMemory
    from dlrm.data.batch import Batch

STEPS = ("lookup", "bottom", "interaction", "top")  # on the device
GROWTH = 1.25  # of a slot that a batch does not fit in


def on_host(memory: HostMemory, count: int, dtype: Any = np.float32, offset: int = 0) -> NDArray[Any]:
    """Page-locked memory as an array of `count` elements from `offset` bytes on."""
    size = count * np.dtype(dtype).itemsize
    if not size:
        return np.empty(0, dtype)
    return np.frombuffer((ctypes.c_uint8 * size).from_address(memory.host + offset), dtype)


@dataclass(frozen=True)
class Wanted:
    """Which tables' bags of a batch a rank uploads: of all samples, of its own samples, and the lengths of its own."""

    owned: tuple[int, ...]
    replicated: tuple[int, ...]
    divided: tuple[int, ...]  # whose sums become means here

    def upload_bytes(self, batch: Batch, samples: range) -> int:
        """What `Slot.fill` writes."""
        mine = len(samples)
        total = padded(4 * mine * batch.dense.shape[1]) + padded(4 * mine * len(self.divided))
        if self.owned:
            total += _bag_bytes(batch, self.owned, 0, batch.size)
        if self.replicated:
            total += _bag_bytes(batch, self.replicated, samples.start, samples.stop)
        return total


@dataclass(frozen=True)
class Uploaded:
    """Where on the device a batch's data are; lengths float32 [divided tables, samples of this rank], or 0."""

    dense: int
    owned: GpuBags | None
    replicated: GpuBags | None
    lengths: int


class Slot:
    """One batch's memory. The events: its data are on the device, its bottom MLP is done, its predictions are here."""

    def __init__(
        self, device: Device, upload_bytes: int, samples: int, row_bytes: int, replicated: int, kept: int, timed: bool
    ) -> None:
        """`row_bytes` of a vector; `replicated` vectors a sample are pooled here, `kept` copied to the host; `timed`:
        count the time of its steps on the device."""
        self._device = device
        self._room = padded(max(upload_bytes, 1))
        self._host, self._there = device.host_memory(self._room), device.memory(self._room)
        self.bottoms = device.memory(max(1, samples * row_bytes))
        self.replicated = device.memory(max(1, samples * replicated * row_bytes))
        self.results = device.host_memory(max(1, 2 * 4 * samples))  # logits, then probabilities
        self.kept = device.host_memory(max(1, samples * kept * row_bytes))
        self.uploaded, self.bottom, self.finished = (device.event() for _ in range(3))
        self._clocks = {step: (device.event(True), device.event(True)) for step in STEPS} if timed else {}
        self._steps: list[str] = []  # that were timed

    def _grow(self, size: int) -> None:
        self._host.close()
        self._there.close()
        self._room = padded(size)
        self._host, self._there = self._device.host_memory(self._room), self._device.memory(self._room)

    @property
    def device_bytes(self) -> int:
        """GPU memory of this slot."""
        return self._room + self.bottoms.size + self.replicated.size

    def fill(self, batch: Batch, samples: range, wanted: Wanted, stream: int) -> Uploaded:
        """Put what is wanted of a batch into page-locked memory, and on its way there; `uploaded` follows it."""
        if (size := wanted.upload_bytes(batch, samples)) > self._room:
            self._grow(int(size * GROWTH))
        writer = _Writer(on_host(self._host, self._room, np.uint8), self._there.address)
        mine = slice(samples.start, samples.stop)
        dense = writer.put([batch.dense[mine].numpy()], np.float32)
        divisors = [_lengths(batch, table, mine) for table in wanted.divided]
        lengths = writer.put(divisors, np.float32) if divisors else 0
        owned = _put_bags(writer, batch, wanted.owned, 0, batch.size) if wanted.owned else None
        replicated = None
        if wanted.replicated and len(samples):
            replicated = _put_bags(writer, batch, wanted.replicated, samples.start, samples.stop)
        self._device.copy(self._there.address, self._host.host, writer.used, stream)
        self._device.record(self.uploaded, stream)
        return Uploaded(dense, owned, replicated, lengths)

    @contextmanager
    def step(self, name: str, stream: int) -> Iterator[None]:
        """What is put on the stream inside is one of STEPS."""
        if not self._clocks:
            yield
            return
        self._device.record(self._clocks[name][0], stream)
        yield
        self._device.record(self._clocks[name][1], stream)
        self._steps.append(name)

    def elapsed(self) -> list[tuple[str, float]]:
        """Steps, all of them done, and their milliseconds on the device; begins anew."""
        found = [(name, self._clocks[name][1].elapsed_ms(self._clocks[name][0])) for name in self._steps]
        self._steps.clear()
        return found

    def close(self) -> None:
        """Give all back. Nothing on the device may use it any more."""
        for memory in (self._host, self._there, self.bottoms, self.replicated, self.results, self.kept):
            memory.close()
        for event in (self.uploaded, self.bottom, self.finished, *chain.from_iterable(self._clocks.values())):
            event.close()


@dataclass
class _Writer:
    """Arrays one after another, each aligned, in page-locked memory that is copied to `there` as a whole."""

    here: NDArray[np.uint8]
    there: int
    used: int = field(default=0)

    def put(self, arrays: Sequence[NDArray[Any]], dtype: Any) -> int:
        """Write arrays as one; where it will be on the device."""
        address = self.there + self.used
        for array in arrays:
            size = array.size * np.dtype(dtype).itemsize
            self.here[self.used : self.used + size].view(dtype)[:] = array.reshape(-1)
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


def _bag_bytes(batch: Batch, tables: Sequence[int], lo: int, hi: int) -> int:
    lookups = sum(int(batch.offsets[table][hi]) - int(batch.offsets[table][lo]) for table in tables)
    weights = 0 if batch.weights is None else padded(4 * lookups)
    return padded(8 * lookups) + weights + padded(8 * len(tables) * (hi - lo + 1)) + padded(8 * len(tables))


def _lengths(batch: Batch, table: int, mine: slice) -> NDArray[np.float32]:
    ends = batch.offsets[table].numpy()[mine.start : mine.stop + 1]
    return np.maximum(np.diff(ends), 1).astype(np.float32)
