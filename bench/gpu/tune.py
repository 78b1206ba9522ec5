"""`python -m bench.gpu.tune`: our kernels by themselves, compiled and cut in other ways, next to copies.

Pooled lookups as `bench gpu lookup` has them, each way with every bit checked; and the interaction of MLPerf's model.
What is best belongs into pool.cu and pooling.py: nothing here is a setting.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing
from dataclasses import dataclass, field
from statistics import median

from bench.gpu import device as gpu
from bench.gpu.device import Clock
from bench.gpu.effort import Effort, Work
from bench.gpu.lookup_rank import BATCHES, Batch, Launch, Room, Tables, batches, checked, rounds
from blsrdma.errors import CompileError
from blsrdma.gpu import compiler, pooling
from blsrdma.gpu.device import unavailable
from blsrdma.gpu.pooling import GpuTable, PooledLookup
from dlrm.gpu.interaction import GpuInteraction, bytes_moved
from dlrm.placement import Placement
from dlrm.shape import ModelShape, interaction_width


@dataclass(frozen=True)
class Way:
    """How the pooled lookup is compiled and cut."""

    name: str
    macros: dict[str, str | int] = field(default_factory=dict)
    run: int | None = None


WAYS = (
    Way("as it is"),
    *(Way(f"{ahead} rows ahead, {blocks} blocks", {"POOL_AHEAD": ahead, "POOL_BLOCKS": blocks})
      for ahead, blocks in ((4, 8), (8, 5), (8, 7), (8, 8), (16, 4))),
    Way("rows past the first-level cache", {"POOL_LOAD": "__ldcg"}),
    *(Way(f"{run} bags to a group", run=run) for run in (1, 2, 4, 8)),
)  # fmt: skip


def main(arguments: list[str] | None = None, effort: Effort | None = None) -> int:
    """The command; `effort`: for tests."""
    effort = effort or Effort()
    parser = argparse.ArgumentParser("python -m bench.gpu.tune", description=__doc__)
    parser.add_argument("--draw", default=effort.draws[0], help=f"how rows are drawn ({effort.draws[0]})")
    parser.add_argument("--pooling", type=int, default=effort.pooling, help=f"rows of a bag ({effort.pooling})")
    parser.add_argument("--rows", type=int, default=effort.rows or 1_000_000, help="rows of each table (a million)")
    options = parser.parse_args(arguments)
    if not effort.prepare and (why := unavailable()):
        print(f"bench.gpu.tune: nothing ran: {why}")
        return 0
    work = Work(options.rows, effort.tables, effort.dim, options.pooling, effort.samples, effort.block, options.draw)
    clock = Clock(gpu.opened(effort.prepare))
    copy = median(gpu.copy_gbs(clock, effort.copy_bytes, effort.repeat))
    print(f"{clock.device.name}; a copy reaches {copy:.0f} GB/s, read and written")
    print(
        f"{work.tables} tables of {work.rows:,} rows, dim {work.dim}, pooling {work.pooling}, "
        f"batch {work.samples:,}, {work.draw}"
    )
    with Room(clock) as room:
        times, given = pooled(room, work, effort)
        lookups, bags = given[0].indices.size, work.samples * work.tables
        size = pooling.bytes_moved("fp32", work.dim, lookups, bags)
        for name, ms in times.items():
            show(name, ms, size, copy)
    show("interaction, 26 tables", *interaction(clock, effort), copy)
    return 0


def show(name: str, ms: list[float], size: int, copy: float) -> None:
    """One line."""
    gbs = size / median(ms) / 1e6
    print(
        f"{name:34} {median(ms):8.3f} ms ({min(ms):.3f} to {max(ms):.3f})  {gbs:6.0f} GB/s  {gbs / copy:5.2f} of a copy"
    )


def pooled(room: Room, work: Work, effort: Effort) -> tuple[dict[str, list[float]], list[Batch]]:
    """Milliseconds of each way, after its sums have been checked."""
    tables, given = Tables(room, work), batches(room, work)
    size = work.rows * work.dim * 4
    everything = [GpuTable(t, work.rows, tables.memory.address + t * size) for t in range(work.tables)]
    out, stream = room.memory(4 * work.samples * work.tables * work.dim), room.clock.stream
    chosen: dict[str, Launch] = {}
    for way in WAYS:
        macros = pooling.defines("fp32", False, 4) | way.macros
        lookup = room.enter_context(
            closing(PooledLookup(room.device, everything, work.dim, macros=way.macros, run=way.run))
        )

        def launch(i: int, lookup: PooledLookup = lookup) -> None:
            lookup.launch(given[i % BATCHES].bags, [out.address], [0, work.samples], stream)

        try:
            usage = compiler.compiled(pooling.SOURCE, macros, room.device.capability).usage.get("pool")
        except CompileError as error:
            print(f"{way.name}: {error}", file=sys.stderr)
            continue
        if usage and (way.macros or not chosen):
            print(f"{way.name}: {usage.registers} registers, {usage.spilled_bytes} bytes spilled")
        room.device.fill(out.address, 0xFF, 4 * work.samples * work.tables * work.dim, stream)
        launch(0)
        checked(tables, given[0], room.clock, out)
        chosen[way.name] = launch
    return rounds(room.clock, chosen, effort.repeat, effort.kernel_ms, lambda _: None), given


def interaction(clock: Clock, effort: Effort) -> tuple[list[float], int]:
    """Milliseconds, and bytes, of the interaction of a batch whose vectors have come from two ranks."""
    dim, tables, samples = effort.dim, 26, effort.samples
    width = interaction_width(tables, dim, "dot", False)
    shape = ModelShape((1,) * tables, dim, (1, dim), (width, 1))
    with Room(clock) as room, closing(GpuInteraction(room.device, shape, Placement(tables, 2))) as made:
        bottoms = room.memory(4 * samples * dim)
        parts = [room.memory(4 * samples * tables // 2 * dim) for _ in range(2)]
        out = room.memory(4 * samples * width)
        for memory, size in ((bottoms, samples * dim), *((part, samples * tables // 2 * dim) for part in parts)):
            room.device.fill(memory.address, 0, 4 * size, clock.stream)

        def launch(_: int) -> None:
            made.launch(samples, bottoms.address, [part.address for part in parts], 0, out.address, clock.stream)

        ms = rounds(clock, {"": launch}, effort.repeat, effort.kernel_ms, lambda _: None)[""]
        return ms, bytes_moved(made, samples)


if __name__ == "__main__":
    sys.exit(main())
