"""The inference loop of one rank, where every rank has the whole batch (for --input sharded see `queries`).

In each iteration: complete what the lag bound demands, look the own tables up for the whole batch, post, evaluate
the bottom MLP meanwhile, complete whatever else has arrived, in order; completing is interaction, top MLP and
sigmoid. The bound is waited for *before* the work of an iteration: a loop that worked first would run with a lag of
one more. In an open loop the rank also completes what is ready while it waits for the next batch to arrive.
"""

from __future__ import annotations

from dlrm import bags
from dlrm.data.batch import Batch
from dlrm.loop import HostLoop, Pending
from dlrm.routes import AlltoallvRoute
from dlrm.timeline import clock


class Engine(HostLoop[AlltoallvRoute, Batch]):
    """Runs batches through a route and the dense model on one rank. Every rank must bring the same batches."""

    def _begin(self) -> None:
        with self.timeline.phase("wait"):
            self._route.begin()

    def _started(self, batch: Batch) -> Pending:
        timeline, route = self.timeline, self._route
        with timeline.phase("lookup"):
            bags.check(batch, route.tables.table_rows, self._checked)
            pooled = route.lookup(batch)
        timeline.before.append(self._watch.lap())
        with timeline.phase("post"):
            flight = route.post(pooled)
        timeline.posted.append(clock())
        samples = self._placement.samples(batch.size)[self._rank]
        dense = self._dense.slice(samples)
        with timeline.phase("dense"):
            dense.bottom(batch.dense)
        return Pending(flight, dense, batch.slice(samples.start, samples.stop, self._finish.wanted))
