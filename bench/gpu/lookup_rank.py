"""Pooled lookups, in one rank: the same bags by blsrdma's kernel, torch.nn.EmbeddingBag and FBGEMM's TBE.

The tables lie one after the other in one piece of GPU memory, which all but FBGEMM read; their contents repeat a block
of random numbers, so that the host knows every row. Several batches take turns, so that no launch finds the rows of
the one before it in a cache more than serving would.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.gpu import device as gpu
from bench.gpu.device import Clock
from bench.gpu.effort import Work
from bench.systems.base import Runtime
from blsrdma.gpu.arrays import GpuArray
from blsrdma.gpu.pooling import GpuBags, GpuTable, PooledLookup, bytes_moved
from blsrdma.ucx import native
from dlrm.data.draws import UniformDraw, Zipf, parse

BATCHES = 4
CHECKED = 8  # samples of each table, every bit
Launch = Callable[[int], object]  # of batch i modulo BATCHES


class Tables:
    """All rows in GPU memory."""

    def __init__(self, clock: Clock, work: Work) -> None:
        device, self.work = clock.device, work
        self.block = np.random.default_rng(1).standard_normal(work.block, np.float32)
        self.memory = device.memory(work.table_bytes)
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

    def __init__(self, clock: Clock, work: Work, indices: NDArray[np.int64]) -> None:
        self.indices = indices  # [tables, samples * pooling]
        device, lookups = clock.device, indices.size
        self.offsets = np.arange(0, lookups + 1, work.pooling, dtype=np.int64)  # of all tables, one list
        self.fused = indices + np.arange(work.tables, dtype=np.int64)[:, None] * work.rows
        self.distinct = sum(len(np.unique(each)) for each in indices)
        self._kept = [device.memory(array.nbytes) for array in (indices, self.offsets, self.fused)]
        for memory, array in zip(self._kept, (indices, self.offsets, self.fused), strict=True):
            device.copy(memory.address, np.ascontiguousarray(array).ctypes.data, array.nbytes, clock.stream)
        clock.settle()
        self.at_indices, self.at_offsets, self.at_fused = (memory.address for memory in self._kept)
        self.bags = GpuBags(work.samples, self.at_indices, lookups, self.at_offsets, work.samples)


def batches(clock: Clock, work: Work) -> list[Batch]:
    """Drawn alike, each for itself."""
    draw, lengths = parse(work.draw), np.full(work.samples, work.pooling, np.int64)
    random = np.random.default_rng(2)
    return [
        Batch(clock, work, np.stack([draw.rows(random, t, work.rows, lengths) for t in range(work.tables)]))
        for _ in range(BATCHES)
    ]


def ours(clock: Clock, tables: list[GpuTable], work: Work, given: list[Batch]) -> tuple[Launch, native.cuda.Memory]:
    """The kernel, and where it writes: [samples, tables, dim]."""
    lookup = PooledLookup(clock.device, tables, work.dim)
    out = clock.device.memory(4 * work.samples * work.tables * work.dim)

    def launch(i: int) -> None:
        lookup.launch(given[i % BATCHES].bags, [out.address], [0, work.samples], clock.stream)

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


def torch_bags(clock: Clock, tables: Tables, given: list[Batch], fused: bool) -> Launch:
    """torch.nn.EmbeddingBag of every table, or one over the rows of all, on our stream and our memory."""
    import torch
    from torch.nn.functional import embedding_bag

    if not torch.cuda.is_available():
        raise RuntimeError(f"torch {torch.__version__} has no CUDA here")
    work, stream = tables.work, torch.cuda.ExternalStream(clock.stream)

    def view(address: int, shape: tuple[int, ...], dtype: Any) -> torch.Tensor:
        return torch.as_tensor(GpuArray(address, shape, np.dtype(dtype)), device="cuda")

    weights = view(tables.memory.address, (work.tables * work.rows, work.dim), np.float32)
    count = work.samples * work.pooling

    def launch_fused(i: int) -> None:
        batch = inputs[i % BATCHES]
        with torch.cuda.stream(stream), torch.inference_mode():
            embedding_bag(batch[0], weights, batch[1], mode="sum", include_last_offset=True)

    def launch_each(i: int) -> None:
        indices, offsets = inputs[i % BATCHES]
        with torch.cuda.stream(stream), torch.inference_mode():
            for t in range(work.tables):
                embedding_bag(
                    indices[t * count : (t + 1) * count], weights[t * work.rows : (t + 1) * work.rows], offsets,
                    mode="sum", include_last_offset=True,
                )  # fmt: skip

    inputs = [
        (view(batch.at_fused if fused else batch.at_indices, (work.tables * count,), np.int64),
         view(batch.at_offsets, (work.tables * work.samples + 1 if fused else work.samples + 1,), np.int64))
        for batch in given
    ]  # fmt: skip
    return launch_fused if fused else launch_each


def fbgemm(clock: Clock, tables: Tables, given: list[Batch]) -> Launch:
    """FBGEMM's table-batched kernel for inference, fp32 rows, weights of its own."""
    import torch
    from fbgemm_gpu.split_embedding_configs import SparseType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_inference import IntNBitTableBatchedEmbeddingBagsCodegen

    work, stream = tables.work, torch.cuda.ExternalStream(clock.stream)
    specs = [(str(t), work.rows, work.dim, SparseType.FP32, EmbeddingLocation.DEVICE) for t in range(work.tables)]
    kernel = IntNBitTableBatchedEmbeddingBagsCodegen(specs, output_dtype=SparseType.FP32, device="cuda")
    kernel.fill_random_weights()
    inputs = [(torch.from_numpy(batch.indices.reshape(-1)).int().cuda(), torch.from_numpy(batch.offsets).int().cuda())
              for batch in given]  # fmt: skip

    def launch(i: int) -> None:
        with torch.cuda.stream(stream), torch.inference_mode():
            kernel(*inputs[i % BATCHES])

    return launch


def measure(
    _runtime: Runtime, progress: Callable[[int], None], prepare: str, work: dict[str, Any], repeat: int, ms: float,
    copy_bytes: int,
) -> dict[str, Any]:  # fmt: skip
    """Every kernel on the same bags: ms of each repetition, which go round the kernels."""
    clock, job = Clock(gpu.opened(prepare)), Work(**work)
    copies = gpu.copy_gbs(clock, copy_bytes, repeat)
    tables = Tables(clock, job)
    given = batches(clock, job)
    size = job.rows * job.dim * 4
    launch, out = ours(clock, [GpuTable(t, job.rows, tables.memory.address + t * size) for t in range(job.tables)],
                       job, given)  # fmt: skip
    launch(0)
    verified = checked(tables, given[0], clock, out)
    chosen: dict[str, Launch] = {"blsrdma": launch}
    skipped = {}
    for name, make in (
        ("torch, a bag per table", partial(torch_bags, clock, tables, given, fused=False)),
        ("torch, one over all", partial(torch_bags, clock, tables, given, fused=True)),
        ("FBGEMM TBE", partial(fbgemm, clock, tables, given)),
    ):
        try:
            made = make()
            made(0)
            clock.settle()
            chosen[name] = made
        except Exception as error:  # a peer that is not there, or has no memory left
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    samples = rounds(clock, chosen, repeat, ms, progress)
    lookups = given[0].indices.size
    distinct = round(float(np.mean([batch.distinct for batch in given])))
    bags = job.samples * job.tables
    return {
        "device": gpu.facts(clock.device), "copy_gbs": copies, "ms": samples, "skipped": skipped, "verified": verified,
        "distinct": distinct, "lookups": lookups,
        "must_bytes": bytes_moved("fp32", job.dim, lookups, bags, distinct=distinct),
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
    clock, job = Clock(gpu.opened(prepare)), Work(**work)
    device, row = clock.device, job.dim * 4
    host_copies = gpu.host_gbs(clock, copy_bytes, repeat)
    tables = Tables(clock, job)
    draw, lengths = parse(job.draw), np.full(job.samples, job.pooling, np.int64)
    assert isinstance(draw, Zipf | UniformDraw)
    random = np.random.default_rng(3)

    def ranks(table: int) -> NDArray[np.int64]:  # row 0 is the hottest
        if isinstance(draw, UniformDraw):
            return draw.rows(random, table, job.rows, lengths)
        return draw.ranks(random.random(int(lengths.sum())), job.rows)

    given = [Batch(clock, job, np.stack([ranks(t) for t in range(job.tables)])) for _ in range(BATCHES)]
    found: list[dict[str, Any]] = []
    chosen: dict[str, Launch] = {}
    size = job.rows * row
    launch, _ = kept = ours(
        clock, [GpuTable(t, job.rows, tables.memory.address + t * size) for t in range(job.tables)], job, given
    )
    keep: list[Any] = [kept]
    chosen["all"] = launch
    drawn = np.concatenate([batch.indices.reshape(-1) for batch in given])
    for share in shares:
        hot = int(min(job.rows - 1, np.quantile(drawn, share) + 1))
        cold_bytes = (job.rows - hot) * row
        cold = device.host_memory(job.tables * cold_bytes)
        keep.append(cold)
        split = []
        for t in range(job.tables):
            source = np.frombuffer((ctypes.c_char * cold_bytes).from_address(cold.host + t * cold_bytes), np.uint8)
            device.copy(source.ctypes.data, tables.memory.address + t * size + hot * row, cold_bytes, clock.stream)
            # Its address as if the hot rows were there, too: only those from `hot` on are read.
            split.append(GpuTable(t, job.rows, tables.memory.address + t * size, hot_rows=hot,
                                  cold=cold.address + t * cold_bytes - hot * row))  # fmt: skip
        clock.settle()
        launch, out = ours(clock, split, job, given)
        launch(0)
        verified = checked(tables, given[0], clock, out)
        keep.append(out)
        chosen[f"{share:g}"] = launch
        found.append({
            "share": share, "hot_rows": hot, "cold_bytes": int(job.tables * cold_bytes), "verified": verified,
            "hot": float((drawn < hot).mean()), "cold_read": int((drawn >= hot).sum() // BATCHES * row),
        })  # fmt: skip
    samples = rounds(clock, chosen, repeat, ms, progress)
    return {"tiers": found, "ms": samples, "host_gbs": host_copies, "work": work}
