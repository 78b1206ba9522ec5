"""Pooled lookups, in one rank: the same bags by blsrdma's kernel and by its peers (lookup_peers).

The tables lie one after the other in one piece of GPU memory, which all but FBGEMM read; their contents repeat a block
of random numbers, so that the host knows every row. Several batches take turns, so that no launch finds the rows of
the one before it in a cache more than serving would.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.gpu import device as gpu
from bench.gpu import lookup_peers as peers
from bench.gpu.device import Clock
from bench.gpu.effort import Work
from bench.systems.base import Runtime
from blsrdma.gpu.pooling import GpuBags, GpuTable, PooledLookup, bytes_moved
from blsrdma.ucx import native
from dlrm.data.draws import Zipf, parse

BATCHES = 4
CHECKED = 8  # samples of each table, every bit
Launch = Callable[[int], object]  # of batch i modulo BATCHES


class Room(ExitStack):
    """What a case takes on the device, given back at its end."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.device = clock, clock.device

    def memory(self, size: int) -> native.cuda.Memory:
        """In the device's memory."""
        return self.enter_context(closing(self.device.memory(size)))

    def host_memory(self, size: int) -> native.cuda.HostMemory:
        """Page-locked."""
        return self.enter_context(closing(self.device.host_memory(size)))


class Tables:
    """All rows in GPU memory."""

    def __init__(self, room: Room, work: Work) -> None:
        device, clock, self.work = room.device, room.clock, work
        self.block = np.random.default_rng(1).standard_normal(work.block, np.float32)
        self.memory = room.memory(work.table_bytes)
        device.copy(self.memory.address, self.block.ctypes.data, min(self.block.nbytes, work.table_bytes), clock.stream)
        done = self.block.nbytes
        while done < work.table_bytes:  # what is there already once more
            size = min(done, work.table_bytes - done)
            device.copy(self.memory.address + done, self.memory.address, size, clock.stream)
            done += size
        clock.settle()

    def row(self, table: int, row: int) -> NDArray[np.float32]:
        """As the device has it."""
        start = (table * self.work.rows + row) * self.work.dim
        return self.block[np.arange(start, start + self.work.dim) % len(self.block)]


class Batch:
    """Indices and offsets of all tables, on the host and on the device. Indices are of the table, or of all rows."""

    def __init__(self, room: Room, work: Work, indices: NDArray[np.int64]) -> None:
        self.indices = indices  # [tables, samples * pooling]
        device, lookups = room.device, indices.size
        self.offsets = np.arange(0, lookups + 1, work.pooling, dtype=np.int64)  # of all tables, one list
        self.fused = indices + np.arange(work.tables, dtype=np.int64)[:, None] * work.rows
        self.distinct = sum(len(np.unique(each)) for each in indices)
        kept = [room.memory(array.nbytes) for array in (indices, self.offsets, self.fused)]
        for memory, array in zip(kept, (indices, self.offsets, self.fused), strict=True):
            device.copy(memory.address, array.ctypes.data, array.nbytes, room.clock.stream)
        room.clock.settle()
        self.at_indices, self.at_offsets, self.at_fused = (memory.address for memory in kept)
        self.bags = GpuBags(work.samples, self.at_indices, lookups, self.at_offsets, work.samples)


def batches(room: Room, work: Work) -> list[Batch]:
    """Drawn alike, each for itself."""
    draw, lengths = parse(work.draw), np.full(work.samples, work.pooling, np.int64)
    random = np.random.default_rng(2)
    return [
        Batch(room, work, np.stack([draw.rows(random, t, work.rows, lengths) for t in range(work.tables)]))
        for _ in range(BATCHES)
    ]


def ours(room: Room, tables: list[GpuTable], work: Work, given: list[Batch]) -> tuple[Launch, native.cuda.Memory]:
    """The kernel, and where it writes: [samples, tables, dim]."""
    lookup = room.enter_context(closing(PooledLookup(room.device, tables, work.dim)))
    out, stream = room.memory(4 * work.samples * work.tables * work.dim), room.clock.stream

    def launch(i: int) -> None:
        lookup.launch(given[i % BATCHES].bags, [out.address], [0, work.samples], stream)

    return launch, out


def checked(tables: Tables, batch: Batch, clock: Clock, out: native.cuda.Memory) -> int:
    """Compare sums with additions in index order, bit by bit; how many bytes. Raises AssertionError."""
    work = tables.work
    found = np.empty((work.samples, work.tables, work.dim), np.float32)
    clock.device.copy(found.ctypes.data, out.address, found.nbytes, clock.stream)
    clock.settle()
    samples = np.unique(np.linspace(0, work.samples - 1, CHECKED).astype(int))
    for table in range(work.tables):
        for sample in samples:
            bag = batch.indices[table, sample * work.pooling : (sample + 1) * work.pooling]
            wanted = np.zeros(work.dim, np.float32)
            for row in bag:
                wanted += tables.row(table, int(row))
            if found[sample, table].tobytes() != wanted.tobytes():
                raise AssertionError(f"table {table}, sample {sample}: not the sum of its rows, in their order")
    return len(samples) * work.tables * work.dim * 4


def measure(
    _runtime: Runtime, progress: Callable[[int], None], prepare: str, work: dict[str, Any], repeat: int, ms: float,
    copy_bytes: int,
) -> dict[str, Any]:  # fmt: skip
    """Every kernel on the same bags: ms of each repetition, which go round the kernels."""
    peers.forget()
    clock, job = Clock(gpu.opened(prepare)), Work(**work)
    copies = gpu.copy_gbs(clock, copy_bytes, repeat)
    with Room(clock) as room:
        tables, given = Tables(room, job), batches(room, job)
        size = job.rows * job.dim * 4
        everything = [GpuTable(t, job.rows, tables.memory.address + t * size) for t in range(job.tables)]
        launch, out = ours(room, everything, job, given)
        launch(0)
        verified = checked(tables, given[0], clock, out)
        chosen, skipped = {"blsrdma": launch}, {}
        for name, make in (
            ("torch, a bag per table", partial(peers.torch_bags, fused=False)),
            ("torch, one over all", partial(peers.torch_bags, fused=True)),
            ("FBGEMM TBE", peers.fbgemm),
        ):
            try:
                made = make(clock.stream, job, tables.memory.address, given)
                made(0)
                clock.settle()
                chosen[name] = made
            except Exception as error:  # a peer that is not there, or has no memory left
                skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        samples = rounds(clock, chosen, repeat, ms, progress)
        launch(1)
        verified += checked(tables, given[1], clock, out)
    lookups, bags = given[0].indices.size, job.samples * job.tables
    distinct = round(float(np.mean([batch.distinct for batch in given])))
    return {
        "copy_gbs": copies, "ms": samples, "skipped": skipped, "verified": verified, "distinct": distinct,
        "lookups": lookups, "must_bytes": bytes_moved("fp32", job.dim, lookups, bags, distinct=distinct),
        "gathered_bytes": bytes_moved("fp32", job.dim, lookups, bags),
    }  # fmt: skip


def rounds(
    clock: Clock, chosen: dict[str, Launch], repeat: int, ms: float, progress: Callable[[int], None]
) -> dict[str, list[float]]:
    """Milliseconds of one launch, of each in every round."""
    times = {name: clock.enough(launch, ms) for name, launch in chosen.items()}
    samples: dict[str, list[float]] = {name: [] for name in chosen}
    names = list(chosen)
    for repetition in range(repeat):
        for k in range(len(names)):
            name = names[(k + repetition) % len(names)]
            samples[name].append(clock.ms(chosen[name], times[name], repetition))
        progress(repetition + 1)
    return samples


def tiers(
    _runtime: Runtime, progress: Callable[[int], None], prepare: str, work: dict[str, Any], repeat: int, ms: float,
    shares: list[float], copy_bytes: int,
) -> dict[str, Any]:  # fmt: skip
    """All rows in GPU memory, and only the hottest so many of each table, the others in page-locked host memory.

    shares: of the lookups that are to find their row hot.
    """
    peers.forget()
    clock, job = Clock(gpu.opened(prepare)), Work(**work)
    host_copies = gpu.host_gbs(clock, copy_bytes, repeat)
    draw, lengths = parse(job.draw), np.full(job.samples, job.pooling, np.int64)
    random = np.random.default_rng(3)

    def ranks(table: int) -> NDArray[np.int64]:  # row 0 is the hottest
        if isinstance(draw, Zipf):
            return draw.ranks(random.random(int(lengths.sum())), job.rows)
        return draw.rows(random, table, job.rows, lengths)

    row = job.dim * 4
    size = job.rows * row
    found: list[dict[str, Any]] = []
    with Room(clock) as room:
        tables = Tables(room, job)
        given = [Batch(room, job, np.stack([ranks(t) for t in range(job.tables)])) for _ in range(BATCHES)]
        drawn = np.concatenate([batch.indices.reshape(-1) for batch in given])
        base = [tables.memory.address + t * size for t in range(job.tables)]
        launch, _ = ours(room, [GpuTable(t, job.rows, base[t]) for t in range(job.tables)], job, given)
        chosen = {"all": launch}
        for share in shares:
            hot = int(min(job.rows - 1, np.quantile(drawn, share) + 1))
            cold_bytes = (job.rows - hot) * row
            cold = room.host_memory(job.tables * cold_bytes)
            split = []
            for t in range(job.tables):
                clock.device.copy(cold.host + t * cold_bytes, base[t] + hot * row, cold_bytes, clock.stream)
                # The address as if the hot rows were in host memory, too: only those from `hot` on are read there.
                at = cold.address + t * cold_bytes - hot * row
                split.append(GpuTable(t, job.rows, base[t], hot_rows=hot, cold=at))
            clock.settle()
            launch, out = ours(room, split, job, given)
            launch(0)
            chosen[f"{share:g}"] = launch
            found.append({
                "share": share, "hot": float((drawn < hot).mean()), "hot_rows": hot, "cold_bytes": cold.size,
                "cold_read": int((drawn >= hot).sum()) // BATCHES * row,
                "verified": checked(tables, given[0], clock, out),
            })  # fmt: skip
        samples = rounds(clock, chosen, repeat, ms, progress)
    return {"tiers": found, "ms": samples, "host_gbs": host_copies, "work": work}
