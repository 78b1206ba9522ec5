"""The inference loop of one rank whose tables are on a GPU; every rank has the whole batch.

A batch walks over four streams. One uploads its bags and features; one pools the bags of this rank's tables for all
samples, straight into the windows of the ranks that predict them, and posts; one evaluates the bottom MLP meanwhile;
the last reads the vectors of all ranks out of this rank's windows, gives these back, and goes on with the top MLP and
the copy of its predictions to the host. The host puts work on streams, waits for its peers' counters, and for the
device only where it hands predictions out: those of one batch when later ones are on their way already.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from blsrdma.errors import GpuError
from dlrm.dense import assemble
from dlrm.gpu.slots import STEPS, Slot
from dlrm.gpu.staging import Staged, Stager, Uploaded, Wanted, on_host
from dlrm.loop import Loop, Predictions
from dlrm.tables import lengths
from dlrm.timeline import clock

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch import Tensor

    from blsrdma import GpuExchange
    from blsrdma.gpu.handle import GpuHandle
    from dlrm.gpu.accelerator import Lane
    from dlrm.gpu.dense import GpuDense
    from dlrm.gpu.tables import GpuTables
    from dlrm.placement import Placement

AHEAD = 2  # finished batches whose predictions the host does not wait for yet


def slots_needed(lag: int) -> int:
    """Batches that are on their way at once, at most: posted, finished, due, and uploaded ahead of that."""
    return lag + 1 + AHEAD + 2


@dataclass(frozen=True)
class Ahead:
    """A batch that is being uploaded."""

    staged: Staged
    slot: Slot
    there: Uploaded

    @property
    def samples(self) -> tuple[range, ...]:
        """Its samples, by rank."""
        return self.staged.samples


@dataclass(frozen=True)
class OnItsWay:
    """A batch from its post to its predictions."""

    handle: GpuHandle
    batch: Ahead
    mine: range  # this rank's samples of it
    launches: tuple[int | None, int | None]  # of the rank's tables, and of the replicated ones

    @property
    def slot(self) -> Slot:
        """Its memory."""
        return self.batch.slot


class GpuEngine(Loop[Ahead]):
    """Runs batches through an exchange, tables and a dense model on one GPU. Every rank must bring the same batches.

    `new_slot` makes the memory of one batch; `close` gives it back. To be run by `serve`.
    """

    def __init__(
        self,
        rank: int,
        placement: Placement,
        exchange: GpuExchange,
        tables: GpuTables,
        replicated: GpuTables | None,
        dense: GpuDense,
        stager: Stager,
        wanted: Wanted,
        new_slot: Callable[[], Slot],
        lanes: tuple[Lane, Lane],
        *,
        keep_pooled: bool = False,
        timeout: float = 60.0,
        **settings: Any,
    ) -> None:
        super().__init__(rank, placement, exchange.lag, **settings)
        self._exchange, self._tables, self._replicated, self._dense = exchange, tables, replicated, dense
        self._stager, self._wanted, self._keep_pooled, self._timeout = stager, wanted, keep_pooled, timeout
        self._upload, self._look = (lane.address for lane in lanes)
        self._free = [new_slot() for _ in range(slots_needed(exchange.lag))]
        self._slots = list(self._free)
        self._posted: deque[OnItsWay] = deque()
        self._finishing: deque[OnItsWay] = deque()
        self._device = dense.device
        self.device_ms = dict.fromkeys(STEPS, 0.0)  # what the steps took there, where slots have clocks

    def serve(self, batches: Iterable[Staged]) -> Iterator[Predictions]:
        """`run` on batches that have been staged. Where the next one is there already (not in an open loop, where it
        has yet to arrive), its upload begins before the work on the one before it."""
        return self.run(self._uploaded(batches) if self._arrivals else self._one_ahead(batches))

    def _uploaded(self, batches: Iterable[Staged]) -> Iterator[Ahead]:
        for staged in batches:
            slot = self._free.pop()
            yield Ahead(staged, slot, slot.upload(staged, self._upload))

    def _one_ahead(self, batches: Iterable[Staged]) -> Iterator[Ahead]:
        uploaded = self._uploaded(batches)
        batch = next(uploaded, None)
        while batch is not None:
            following = next(uploaded, None)
            yield batch
            batch = following

    @property
    def device_bytes(self) -> int:
        """GPU memory of all slots."""
        return sum(slot.device_bytes for slot in self._slots)

    def close(self) -> None:
        """Give the slots, and what was staged, back. Nothing on the device may use them any more."""
        for slot in self._slots:
            slot.close()
        self._stager.close()
        self._slots.clear()

    # --- the steps of Loop

    def _begin(self) -> None:
        with self.timeline.phase("wait"):
            self._exchange.begin()

    def _start(self, batch: Ahead) -> None:
        timeline, slot, there = self.timeline, batch.slot, batch.there
        mine, width = batch.samples[self._rank], len(self._wanted.owned) * self._tables.dim
        with timeline.phase("lookup"):
            placed = self._exchange.place([len(some) * width for some in batch.samples], stream=self._look)
            self._device.order(self._look, slot.uploaded)
            pooled = again = None
            with slot.step("lookup", self._look):
                if there.owned is not None:
                    starts = [0, *accumulate(map(len, batch.samples))]
                    pooled = self._tables.pool(there.owned, placed.addresses, starts, self._look)
                if self._replicated is not None and there.replicated is not None:
                    to = [slot.replicated.address]
                    again = self._replicated.pool(there.replicated, to, [0, len(mine)], self._look)
        timeline.before.append(self._watch.lap())
        with timeline.phase("post"):
            handle = placed.post()
        timeline.posted.append(clock())
        with timeline.phase("dense"):
            self._device.order(lane := self._dense.bottom_lane.address, slot.uploaded)
            with slot.step("bottom", lane):
                self._dense.bottom(slot, there.dense, mine)
            self._device.record(slot.bottom, lane)
        self._posted.append(OnItsWay(handle, batch, mine, (pooled, again)))

    def _unfinished(self) -> int:
        return len(self._posted)

    def _complete(self) -> Iterator[Predictions]:
        self._finish()
        yield from self._done()

    def _available(self) -> Iterator[Predictions]:
        while self._posted and self._ready():
            self._finish()
        yield from self._done()

    def _rest(self) -> Iterator[Predictions]:
        while self._finishing:
            yield self._hand_out()

    # --- inside

    def _ready(self) -> bool:
        with self.timeline.phase("wait"):
            return self._posted[0].handle.ready()

    def _finish(self) -> None:
        """Put the rest of the oldest batch on its stream, once all its vectors have come."""
        way = self._posted.popleft()
        lane = self._dense.finish_lane.address
        with self.timeline.phase("wait"):
            received = way.handle.wait(stream=lane)
        with self.timeline.phase("dense"):
            # The replicated tables were pooled on the stream of the lookups, before the post that is waited for.
            parts = [*received.addresses, *([way.slot.replicated.address] if self._replicated is not None else [])]
            self._device.order(lane, way.slot.bottom)
            with way.slot.step("interaction", lane):
                self._dense.interact(way.slot, parts, way.batch.there.lengths, way.mine)
            if self._keep_pooled:
                self._keep(way, parts)
            way.handle.release(lane)
            with way.slot.step("top", lane):
                self._dense.top(way.slot, way.mine)
            self._device.record(way.slot.finished, lane)
        self._finishing.append(way)

    def _done(self) -> Iterator[Predictions]:
        """The predictions that are here, and those that have to be waited for so that slots come free."""
        while self._finishing and (len(self._finishing) > AHEAD or self._arrived(0)):
            yield self._hand_out()

    def _arrived(self, timeout_ns: int) -> bool:
        with self.timeline.phase("wait"):
            return self._device.finish(self._finishing[0].slot.finished, timeout_ns)

    def _hand_out(self) -> Predictions:
        """The predictions of the oldest batch that is being finished; waits for the device."""
        if not self._arrived(int(min(self._timeout, 1e9) * 1e9)):
            first = self._finishing[0]
            raise GpuError(
                f"rank {self._rank}, iteration {first.handle.iteration}: its GPU has not finished it after "
                f"{self._timeout:g} s"
            )
        way = self._finishing.popleft()
        self._tables.check(way.launches[0])
        if self._replicated is not None:
            self._replicated.check(way.launches[1])
        count = len(way.mine)
        results = torch.from_numpy(on_host(way.slot.results, 2 * count).copy()).view(2, count)
        pooled = self._kept(way) if self._keep_pooled else None
        for name, spent in way.slot.elapsed():
            self.device_ms[name] += spent
        self._free.append(way.slot)
        self._stager.give_back(way.batch.staged)
        self.timeline.emitted.append(clock())
        mine = way.batch.staged.mine
        return Predictions(mine.first, results[0], results[1], pooled, mine.labels)

    # --- pooled vectors that are kept

    def _widths(self) -> list[int]:
        """Vectors of a sample in each part."""
        return [*map(len, self._placement.pieces), *([len(self._wanted.replicated)] if self._replicated else [])]

    def _keep(self, way: OnItsWay, parts: list[int]) -> None:
        at, row = way.slot.kept.address, len(way.mine) * self._tables.dim * 4
        for source, width in zip(parts, self._widths(), strict=True):
            self._device.copy(at, source, width * row, self._dense.finish_lane.address)
            at += width * row

    def _kept(self, way: OnItsWay) -> Tensor:
        """The pooled vectors of a slice [n, T, dim], brought together as on a CPU."""
        count, dim = len(way.mine), self._tables.dim
        widths = self._widths()
        floats = torch.from_numpy(on_host(way.slot.kept, count * sum(widths) * dim).copy())
        pieces = torch.split(floats, [count * width * dim for width in widths])
        parts = [part.view(count, width, dim) for part, width in zip(pieces, widths, strict=True)]
        out = torch.empty(count, self._placement.num_tables, dim)
        means = {table: lengths(way.batch.staged.mine, table) for table in self._wanted.divided}
        assemble(out, parts, self._placement.runs, means, slice(0, count))
        return out
