"""What the inference loops of a rank share: batches are read, awaited, started, and completed in order, as soon as
their rows are here; `timeline` tells afterwards when what happened. `engine` and `asking` say how a batch is started.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from dlrm.tables import lengths
from dlrm.timeline import Stopwatch, Timeline, clock, sleep_for

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator

    from dlrm.data.batch import Batch
    from dlrm.delays import Delay
    from dlrm.dense import DenseSlice, DenseWork
    from dlrm.placement import Placement
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
    version: int = 0  # of the tables, all of them; see `serve`


class Finish:
    """The last steps of every batch of a rank: its replicated tables, assembly, interaction and top MLP."""

    def __init__(self, placement: Placement, replicated: Tables | None, mean: bool, dim: int) -> None:
        self._runs = placement.runs
        self.replicated = {0: replicated}  # by version
        self._divided = placement.divided if mean else ()
        self._tables, self._dim = placement.num_tables, dim
        self.wanted = {*self._divided, *placement.replicated}  # tables of whose bags it asks something

    def kept(self, mine: Batch) -> Tensor:
        """Memory to keep the pooled vectors of the samples `mine` in."""
        return torch.empty(mine.size, self._tables, self._dim)

    def predict(
        self, dense: DenseSlice, parts: list[Tensor], mine: Batch, keep: Tensor | None, version: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Logits and probabilities of the samples `mine`, from one part per owner, [n, tables of it, dim].

        Their pooled vectors [n, T, dim] are left in `keep`.
        """
        replicated = self.replicated[version]
        if replicated is not None:
            parts = [*parts, replicated.lookup_all(mine)]
        return dense.predict(parts, self._runs, {table: lengths(mine, table) for table in self._divided}, keep)


class InFlight(Protocol):
    """Pooled vectors on their way to this rank."""

    def ready(self) -> bool: ...
    def wait(self) -> list[Tensor]: ...
    def release(self) -> None: ...


@dataclass(frozen=True)
class Pending:
    """A batch that has been started."""

    flight: InFlight
    dense: DenseSlice
    mine: Batch  # this rank's samples of it
    version: int = 0  # of the tables that it is answered from


class Route(Protocol):
    """How pooled vectors come here."""

    tables: Tables  # of this rank

    @property
    def lag(self) -> int: ...


Way = TypeVar("Way", bound=Route)
Read = TypeVar("Read")  # what is read: the whole batch, or a rank's own


class Loop(ABC, Generic[Read]):
    """Runs batches on one rank, wherever its tables are. To be used once."""

    def __init__(
        self,
        rank: int,
        placement: Placement,
        lag: int,
        *,
        delay: Delay,
        arrivals: Iterator[float] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self._rank, self._placement, self._lag = rank, placement, lag
        self._delay, self._arrivals = delay, arrivals
        self.timeline = timeline or Timeline()
        self._watch = Stopwatch(self.timeline)

    def _begin(self) -> None:
        """Wait until others, too, allow work on the next batch."""

    @abstractmethod
    def _start(self, batch: Read) -> None:
        """Look up or ask, note timeline.before and timeline.posted, and evaluate the bottom MLP meanwhile."""

    @abstractmethod
    def _unfinished(self) -> int:
        """Batches that have been started, and whose vectors have not all been waited for."""

    @abstractmethod
    def _complete(self) -> Iterator[Predictions]:
        """Finish the oldest of them, waiting for its vectors where they are not here yet."""

    @abstractmethod
    def _available(self) -> Iterator[Predictions]:
        """What can be finished without waiting."""

    def _rest(self) -> Iterator[Predictions]:
        """What has been finished, and not been handed out."""
        return iter(())

    def run(self, batches: Iterable[Read]) -> Iterator[Predictions]:
        """Yield the predictions of every batch, in order, each as soon as it is ready.

        Raises BadIndex before anything of a bad batch is sent; whatever the exchange or the lookup raises passes
        through.
        """
        timeline = self.timeline
        with torch.inference_mode():
            timeline.start = clock()
            self._watch = watch = Stopwatch(timeline)
            for number, batch in enumerate(self._read(batches)):
                if timeline.begin:
                    timeline.after.append(watch.lap())
                else:
                    watch.lap()
                while self._unfinished() > self._lag:
                    yield from self._complete()
                arrived = yield from self._arrival()
                self._begin()
                timeline.begin.append(clock())
                timeline.arrived.append(arrived or timeline.begin[-1])
                timeline.slept.append(sleep_for(self._delay.seconds(self._rank, number, self._placement.ranks)))
                self._start(batch)
                yield from self._available()
            if timeline.begin:
                timeline.after.append(watch.lap())
            while self._unfinished():
                yield from self._complete()
            yield from self._rest()
            timeline.drain = watch.lap()
            timeline.end = clock()

    def _read(self, batches: Iterable[Read]) -> Iterator[Read]:
        source = iter(batches)
        while True:
            with self.timeline.phase("read"):
                batch = next(source, None)
            if batch is None:
                return
            yield batch

    def _arrival(self) -> Generator[Predictions, None, int]:
        """Wait for the next batch to arrive, completing what is ready meanwhile; when it did, or 0 in a closed loop."""
        if self._arrivals is None:
            return 0
        arrived = self.timeline.start + int(next(self._arrivals) * 1e9)
        while clock() < arrived:
            before = len(self.timeline.emitted)
            yield from self._available()
            if before == len(self.timeline.emitted):
                with self.timeline.phase("wait"):
                    time.sleep(NAP_SECONDS)
        return arrived


class HostLoop(Loop[Read], Generic[Way, Read]):
    """A loop over tables in the host's memory, evaluated by torch on the CPU."""

    def __init__(
        self,
        rank: int,
        placement: Placement,
        route: Way,
        dense: DenseWork,
        *,
        delay: Delay,
        keep_pooled: bool = False,
        replicated: Tables | None = None,
        arrivals: Iterator[float] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        super().__init__(rank, placement, route.lag, delay=delay, arrivals=arrivals, timeline=timeline)
        self._route, self._dense, self._keep_pooled = route, dense, keep_pooled
        self._finish = Finish(placement, replicated, route.tables.pooling == "mean", route.tables.dim)
        self._checked = {*route.tables.tables, *(replicated.tables if replicated else ())}
        self._pending: deque[Pending] = deque()

    def run(self, batches: Iterable[Read]) -> Iterator[Predictions]:
        """See `Loop.run`."""
        self._dense.assembly = self.timeline.phase("assemble")
        return super().run(batches)

    @abstractmethod
    def _started(self, batch: Read) -> Pending:
        """See `_start`."""

    def _start(self, batch: Read) -> None:
        self._pending.append(self._started(batch))

    def _unfinished(self) -> int:
        return len(self._pending)

    def _available(self) -> Iterator[Predictions]:
        while self._pending and self._ready():
            yield from self._complete()

    def _ready(self) -> bool:
        with self.timeline.phase("wait"):
            return self._pending[0].flight.ready()

    def _complete(self) -> Iterator[Predictions]:
        pending = self._pending.popleft()
        mine = pending.mine
        with self.timeline.phase("wait"):
            parts = pending.flight.wait()
        pooled = self._finish.kept(mine) if self._keep_pooled else None
        with self.timeline.phase("dense"):
            logits, probabilities = self._finish.predict(pending.dense, parts, mine, pooled, pending.version)
        self.timeline.emitted.append(clock())
        del parts
        with self.timeline.phase("wait"):
            pending.flight.release()
        yield Predictions(mine.first, logits, probabilities, pooled, mine.labels, pending.version)
