"""The inference loop of one rank, where every rank has the whole batch (for --input sharded see `queries`).

In each iteration: complete what the lag bound demands, look the own tables up for the whole batch, post, evaluate
the bottom MLP meanwhile, complete whatever else has arrived, in order; completing is interaction, top MLP and
sigmoid. The bound is waited for *before* the work of an iteration: a loop that worked first would run with a lag of
one more. In an open loop the rank also completes what is ready while it waits for the next batch to arrive.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dlrm import bags
from dlrm.tables import lengths
from dlrm.timeline import Stopwatch, Timeline, clock

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dlrm.data.batch import Batch
    from dlrm.delays import Delay
    from dlrm.dense import DenseSlice, DenseWork
    from dlrm.placement import Placement
    from dlrm.routes import AlltoallvRoute, Flight
    from dlrm.tables import Tables

NAP_SECONDS = 20e-6  # between looks at what may be ready, where nothing is to be done


@dataclass(frozen=True)
class Predictions:
    """What a rank predicts for its slice of one batch: n samples, the first of which is number `first` of the run."""

    first: int
    logits: Tensor  # float32 [n], before the sigmoid
    probabilities: Tensor  # float32 [n]
    pooled: Tensor | None  # float32 [n, T, dim] as received, where they are kept
    labels: Tensor | None = None  # float32 [n], where the batch has them


@dataclass(frozen=True)
class _Pending:
    flight: Flight
    dense: DenseSlice
    mine: Batch


class Finish:
    """The last steps of every batch of a rank: its replicated tables, assembly, interaction and top MLP."""

    def __init__(self, placement: Placement, replicated: Tables | None, mean: bool, dim: int) -> None:
        self._runs = placement.runs
        self._replicated = replicated
        self._divided = placement.divided if mean else ()
        self._tables, self._dim = placement.num_tables, dim

    def kept(self, mine: Batch) -> Tensor:
        """Memory to keep the pooled vectors of the samples `mine` in."""
        return torch.empty(mine.size, self._tables, self._dim)

    def predict(
        self, dense: DenseSlice, parts: list[Tensor], mine: Batch, keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logits and probabilities of the samples `mine`, from one part per owner, [n, tables of it, dim].

        Their pooled vectors [n, T, dim] are left in `keep`.
        """
        if self._replicated is not None:
            parts = [*parts, self._replicated.lookup_all(mine)]
        return dense.predict(parts, self._runs, {table: lengths(mine, table) for table in self._divided}, keep)


class Engine:
    """Runs batches through a route and the dense model on one rank; `timeline` tells afterwards when what happened."""

    def __init__(
        self,
        rank: int,
        placement: Placement,
        route: AlltoallvRoute,
        dense: DenseWork,
        *,
        delay: Delay,
        keep_pooled: bool = False,
        replicated: Tables | None = None,
        arrivals: Iterator[float] | None = None,
    ) -> None:
        self._rank, self._placement = rank, placement
        self._route, self._dense = route, dense
        self._delay, self._keep_pooled = delay, keep_pooled
        self._replicated = replicated
        self._finish = Finish(placement, replicated, route.tables.pooling == "mean", route.tables.dim)
        self._arrivals = arrivals
        self._pending: deque[_Pending] = deque()
        self.timeline = Timeline()

    def run(self, batches: Iterable[Batch]) -> Iterator[Predictions]:
        """Yield the predictions of every batch, in order, each as soon as it is ready. To be used once.

        Every rank must bring the same batches. Raises BadIndex before anything of a bad batch is sent; whatever the
        exchange raises passes through.
        """
        timeline, route, pending = self.timeline, self._route, self._pending
        checked = {*route.tables.tables, *(self._replicated.tables if self._replicated else ())}
        with torch.inference_mode():
            timeline.start, assembled = clock(), self._dense.assembly_ns
            self._watch = watch = Stopwatch()
            source = iter(batches)
            while True:
                with timeline.phase("read"):
                    batch = next(source, None)
                if batch is None:
                    break
                if timeline.begin:
                    timeline.after.append(watch.lap())
                else:
                    watch.lap()
                while pending and pending[0].flight.iteration < route.iteration - route.lag:
                    yield self._complete()
                arrived = 0
                if self._arrivals is not None:
                    arrived = timeline.start + int(next(self._arrivals) * 1e9)
                    while clock() < arrived:
                        if pending and self._ready():
                            yield self._complete()
                        else:
                            with timeline.phase("wait"), watch.away():
                                time.sleep(NAP_SECONDS)
                with timeline.phase("wait"), watch.away():
                    iteration = route.begin()
                timeline.begin.append(clock())
                timeline.arrived.append(arrived or timeline.begin[-1])
                self._stall(iteration)
                with timeline.phase("lookup"):
                    bags.check(batch, route.tables.table_rows, checked)
                    pooled = route.lookup(batch)
                timeline.before.append(watch.lap())
                with timeline.phase("post"), watch.away():
                    flight = route.post(pooled)
                timeline.posted.append(clock())
                samples = self._placement.samples(batch.size)[self._rank]
                dense = self._dense.slice(samples)
                with timeline.phase("dense"):
                    dense.bottom(batch.dense)
                pending.append(_Pending(flight, dense, batch.slice(samples.start, samples.stop)))
                while pending and self._ready():
                    yield self._complete()
            if timeline.begin:
                timeline.after.append(watch.lap())
            while pending:
                yield self._complete()
            timeline.drain = watch.lap()
            timeline.end = clock()
            timeline.split("dense", "assemble", self._dense.assembly_ns - assembled)

    def _ready(self) -> bool:
        with self.timeline.phase("wait"), self._watch.away():
            return self._pending[0].flight.ready()

    def _complete(self) -> Predictions:
        """Finish the oldest pending iteration, waiting for its vectors where they are not here yet."""
        pending = self._pending.popleft()
        with self.timeline.phase("wait"), self._watch.away():
            parts = pending.flight.wait()
        pooled = self._finish.kept(pending.mine) if self._keep_pooled else None
        with self.timeline.phase("dense"):
            logits, probabilities = self._finish.predict(pending.dense, parts, pending.mine, pooled)
        self.timeline.emitted.append(clock())
        del parts
        with self.timeline.phase("wait"), self._watch.away():
            pending.flight.release()
        return Predictions(pending.mine.first, logits, probabilities, pooled, pending.mine.labels)

    def _stall(self, iteration: int) -> None:
        planned = self._delay.seconds(self._rank, iteration, self._placement.ranks)
        started = clock()
        if planned > 0:
            time.sleep(planned)
        self.timeline.slept.append(clock() - started if planned > 0 else 0)
