"""The inference loop of one rank.

In each iteration: complete what the lag bound demands, look the own tables up for the whole batch, post, evaluate
the bottom MLP meanwhile, complete whatever else has arrived, in order; completing is interaction, top MLP and
sigmoid. The bound is waited for *before* the work of an iteration: a loop that worked first would run with a lag of
one more.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dlrm.dense import DenseSlice
from dlrm.timeline import Stopwatch, Timeline, clock

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from dlrm.data.batch import Batch
    from dlrm.delays import Delay
    from dlrm.model import Dense
    from dlrm.placement import Placement
    from dlrm.routes import AlltoallvRoute, Flight


@dataclass(frozen=True)
class Predictions:
    """What a rank predicts for its slice of one batch: n samples, the first of which is number `first` of the run."""

    first: int
    logits: Tensor  # float32 [n], before the sigmoid
    probabilities: Tensor  # float32 [n]
    pooled: Tensor | None  # float32 [n, T, dim] as received, where they are kept


@dataclass(frozen=True)
class _Pending:
    flight: Flight
    dense: DenseSlice
    first: int


class Engine:
    """Runs batches through a route and the dense model on one rank; `timeline` tells afterwards when what happened."""

    def __init__(
        self,
        rank: int,
        placement: Placement,
        route: AlltoallvRoute,
        dense: Dense,
        *,
        block: int = 0,
        delay: Delay,
        keep_pooled: bool = False,
    ) -> None:
        self._rank, self._placement = rank, placement
        self._route, self._dense = route, dense
        self._block, self._delay, self._keep_pooled = block, delay, keep_pooled
        self._pending: deque[_Pending] = deque()
        self.timeline = Timeline()

    def run(self, batches: Iterable[Batch]) -> Iterator[Predictions]:
        """Yield the predictions of every batch, in order, each as soon as it is ready. To be used once.

        Every rank must bring the same batches. Whatever the exchange raises passes through.
        """
        timeline, route, pending = self.timeline, self._route, self._pending
        with torch.inference_mode():
            timeline.start = clock()
            self._watch = watch = Stopwatch()
            for batch in batches:
                if timeline.begin:
                    timeline.after.append(watch.lap())
                else:
                    watch.lap()
                while pending and pending[0].flight.iteration < route.iteration - route.lag:
                    yield self._complete()
                with watch.away():
                    iteration = route.begin()
                timeline.begin.append(clock())
                self._stall(iteration)
                pooled = route.lookup(batch)
                timeline.before.append(watch.lap())
                with watch.away():
                    flight = route.post(pooled)
                timeline.posted.append(clock())
                samples = self._placement.samples(batch.size)[self._rank]
                dense = DenseSlice(self._dense, samples, self._block)
                dense.bottom(batch.dense)
                pending.append(_Pending(flight, dense, batch.first + samples.start))
                while pending and self._ready():
                    yield self._complete()
            if timeline.begin:
                timeline.after.append(watch.lap())
            while pending:
                yield self._complete()
            timeline.drain = watch.lap()
            timeline.end = clock()

    def _ready(self) -> bool:
        with self._watch.away():
            return self._pending[0].flight.ready()

    def _complete(self) -> Predictions:
        """Finish the oldest pending iteration, waiting for its vectors where they are not here yet."""
        pending = self._pending.popleft()
        with self._watch.away():
            parts = pending.flight.wait()
        pending.dense.fill(parts)
        del parts
        with self._watch.away():
            pending.flight.release()
        logits, probabilities = pending.dense.predict()
        self.timeline.emitted.append(clock())
        pooled = pending.dense.pooled() if self._keep_pooled else None
        return Predictions(pending.first, logits, probabilities, pooled)

    def _stall(self, iteration: int) -> None:
        planned = self._delay.seconds(self._rank, iteration, self._placement.ranks)
        started = clock()
        if planned > 0:
            time.sleep(planned)
        self.timeline.slept.append(clock() - started if planned > 0 else 0)
