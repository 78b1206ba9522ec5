"""The inference loop of one rank, where every rank has samples of its own (--input sharded) and the indices travel.

Each iteration is two exchanges: every rank sends every owner the bags of its samples, and every owner answers with the
pooled vectors. A rank that has no batch (none has arrived, or its batches have ended) takes part with no samples, up to
`lag` iterations ahead of the others, and goes on answering, so that nobody waits for its traffic. The run ends in the
first iteration in which every rank has said that its batches have ended; all of them learn that from the same messages.

A query, int32: samples, whether this rank's batches have ended, whether there are weights; then for each piece of the
owner the lengths of the bags, their rows, and the bits of the weights.
"""

from __future__ import annotations

import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from blsrdma.errors import PeerTimeout
from dlrm import bags
from dlrm.data.batch import Batch
from dlrm.loop import NAP_SECONDS, Finish, Predictions
from dlrm.timeline import Timeline, clock, sleep_for

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from blsrdma import Exchange, Handle
    from dlrm.delays import Delay
    from dlrm.dense import DenseSlice, DenseWork
    from dlrm.placement import Piece, Placement
    from dlrm.routes import AlltoallvRoute, Flight
    from dlrm.tables import Tables

HEAD = 3  # int32 words before the bags of a query
NAPS_BETWEEN_CHECKS = 200
CHECK_SECONDS = 100e-6
IDLE_SECONDS = 300e-6  # between iterations in which nobody has samples


def query(batch: Batch | None, pieces: tuple[Piece, ...], ended: bool) -> NDArray[np.int32]:
    """What a rank sends to the owner of `pieces`; whole bags, of which the owner takes its rows."""
    if batch is None:
        return np.array([0, ended, 0], np.int32)
    parts = [np.array([batch.size, ended, batch.weights is not None], np.int32)]
    for piece in pieces:
        parts.append(batch.offsets[piece.table].diff().to(torch.int32).numpy())
        parts.append(batch.indices[piece.table].to(torch.int32).numpy())
        if batch.weights is not None:
            parts.append(batch.weights[piece.table].contiguous().numpy().view(np.int32))
    return np.concatenate(parts)


def largest_query(batches: Iterable[Batch], placement: Placement) -> int:
    """Bytes of the largest query any rank sends for its samples of `batches`."""
    largest = HEAD * 4
    for batch in batches:
        for samples in placement.samples(batch.size):
            mine = batch.slice(samples.start, samples.stop)
            for pieces in placement.pieces:
                words = sum(batch_words(mine, piece.table) for piece in pieces)
                largest = max(largest, 4 * (HEAD + words))
    return largest


def batch_words(batch: Batch, table: int) -> int:
    """int32 words of one table's bags in a query."""
    return batch.size + len(batch.indices[table]) * (1 if batch.weights is None else 2)


def merge(queries: list[NDArray[np.int32]], pieces: tuple[Piece, ...], num_tables: int) -> tuple[Batch, list[int]]:
    """All ranks' bags of `pieces`, one rank after another, as one batch without dense features; samples per rank."""
    samples = [int(words[0]) for words in queries]
    weighted = any(bool(words[2]) for words in queries)
    at = [HEAD] * len(queries)
    nothing = torch.empty(0, dtype=torch.int64)
    indices, offsets = [nothing] * num_tables, [nothing] * num_tables
    weights = [torch.empty(0)] * num_tables
    for piece in pieces:
        lengths, rows, scales = [], [], []
        for rank, words in enumerate(queries):
            if not samples[rank]:
                continue
            ends = at[rank] + samples[rank]
            lengths.append(words[at[rank] : ends])
            count = int(lengths[-1].sum())
            rows.append(words[ends : ends + count])
            at[rank] = ends + count
            if words[2]:
                scales.append(words[at[rank] : at[rank] + count].view(np.float32))
                at[rank] += count
            elif weighted:
                scales.append(np.ones(count, np.float32))
        if not lengths:
            continue
        bounds = np.zeros(sum(samples) + 1, np.int64)
        np.cumsum(np.concatenate(lengths), out=bounds[1:])
        indices[piece.table] = torch.from_numpy(np.concatenate(rows).astype(np.int64))
        offsets[piece.table] = torch.from_numpy(bounds)
        if weighted:
            weights[piece.table] = torch.from_numpy(np.concatenate(scales))
    dense = torch.empty(sum(samples), 0)
    return Batch(0, dense, tuple(indices), tuple(offsets), None, tuple(weights) if weighted else None), samples


@dataclass(frozen=True)
class Own:
    """A rank's own batch, and where its samples are in the global batch, which decides how dense work is cut."""

    batch: Batch
    samples: range


@dataclass(frozen=True)
class _Asked:
    handle: Handle
    own: Own | None
    dense: DenseSlice | None


@dataclass(frozen=True)
class _Answered:
    flight: Flight
    own: Own | None
    dense: DenseSlice | None


class QueryEngine:
    """Runs a rank's own batches; `asking` carries queries, `route` the answers, both with the same lag."""

    def __init__(
        self,
        rank: int,
        placement: Placement,
        asking: Exchange,
        route: AlltoallvRoute,
        dense: DenseWork,
        *,
        delay: Delay,
        keep_pooled: bool = False,
        replicated: Tables | None = None,
        arrivals: Iterator[float] | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        self._rank, self._placement = rank, placement
        self._asking, self._route, self._dense = asking, route, dense
        self._delay, self._keep_pooled = delay, keep_pooled
        self._finish = Finish(placement, replicated, route.tables.pooling == "mean", route.tables.dim)
        self._arrivals = arrivals
        self._asked: deque[_Asked] = deque()
        self._answered: deque[_Answered] = deque()
        self._quiet_since = 0  # nobody had samples in the latest iteration that was answered here, then
        self._over = False
        self._next: Own | None = None
        self._arrived = 0
        self._number = 0
        self._naps = 0
        self.timeline = timeline or Timeline()

    def run(self, batches: Iterable[Own]) -> Iterator[Predictions]:
        """Yield the predictions of this rank's batches, in order, each as soon as it is ready. To be used once.

        Raises BadIndex before anything of a bad batch is sent; whatever the exchanges raise passes through.
        """
        timeline = self.timeline
        timeline.start, self._dense.assembly = clock(), timeline.phase("assemble")
        source = iter(batches)
        with torch.inference_mode():
            self._read(source)
            while not self._over or self._answered:
                if self._answered and self._ready(self._answered[0].flight):
                    predictions = self._complete()
                    if predictions is not None:
                        yield predictions
                elif not self._over and self._asked and self._ready(self._asked[0].handle):
                    self._answer()
                elif not self._over and self._may_ask():
                    own = self._due()
                    self._ask(own)
                    if own is not None:
                        self._read(source)
                else:
                    self._wait()
            timeline.end = clock()

    def _read(self, source: Iterator[Own]) -> None:
        """The next own batch; None at their end."""
        with self.timeline.phase("read"):
            self._next = next(source, None)
        self._arrived = 0
        if self._next is not None and self._arrivals is not None:
            self._arrived = self.timeline.start + int(next(self._arrivals) * 1e9)

    def _due(self) -> Own | None:
        """The next own batch where it has arrived."""
        return self._next if self._next is not None and clock() >= self._arrived else None

    def _may_ask(self) -> bool:
        """Whether the lag allows another iteration, and there is a reason for it."""
        if len(self._asked) + len(self._answered) > self._route.lag:
            return False
        if self._due() is not None:
            return True
        return clock() - self._quiet_since > IDLE_SECONDS * 1e9

    def _ready(self, handle: Handle | Flight) -> bool:
        with self.timeline.phase("wait"):
            return bool(handle.ready())

    def _wait(self) -> None:
        """Nothing can be done now: nap, or where a batch is not what this rank waits for, wait in the exchange."""
        with self.timeline.phase("wait"):
            full = len(self._asked) + len(self._answered) > self._route.lag
            if full and not self._asked:
                self._answered[0].flight.wait()
            elif full and not self._answered and self._due() is not None:
                self._asked[0].handle.wait()
            else:
                time.sleep(NAP_SECONDS)
                self._naps += 1
                if self._naps % NAPS_BETWEEN_CHECKS == 0:
                    self._check_peers()

    def _check_peers(self) -> None:
        """Raise what a wait raises where a peer has failed; only waits look."""
        oldest = self._answered[0].flight if self._answered else self._asked[0].handle if self._asked else None
        if oldest is not None:
            with suppress(PeerTimeout):
                oldest.wait(CHECK_SECONDS)

    def _ask(self, own: Own | None) -> None:
        """Send every owner its part of a batch, or of none."""
        timeline = self.timeline
        if own is not None:
            timeline.begin.append(clock())
            timeline.arrived.append(self._arrived or timeline.begin[-1])
            tables = range(self._placement.num_tables)
            bags.check(own.batch, self._route.tables.table_rows, tables)
            timeline.slept.append(sleep_for(self._delay.seconds(self._rank, self._number, self._placement.ranks)))
            self._number += 1
        ended = own is None and self._next is None
        with timeline.phase("post"):
            batch = None if own is None else own.batch
            parts = [query(batch, pieces, ended) for pieces in self._placement.pieces]
            self._asking.begin()
            handle = self._asking.post(np.concatenate(parts), [len(part) for part in parts])
        if own is None:
            self._asked.append(_Asked(handle, None, None))
            return
        timeline.posted.append(clock())
        timeline.before.append(0)
        timeline.after.append(0)
        dense = self._dense.slice(own.samples)
        with timeline.phase("dense"):
            dense.bottom_of(own.batch.dense)
        self._asked.append(_Asked(handle, own, dense))

    def _answer(self) -> None:
        """Look up what everybody asks in the oldest iteration, and send it."""
        asked = self._asked.popleft()
        pieces = self._placement.pieces[self._rank]
        with asked.handle as received:
            queries = [np.asarray(part) for part in received]
            self._over = all(bool(words[1]) for words in queries)
            with self.timeline.phase("lookup"):
                batch, samples = merge(queries, pieces, self._placement.num_tables)
                pooled = self._route.lookup(batch)
            del queries
        self._quiet_since = 0 if sum(samples) else clock()
        with self.timeline.phase("wait"):
            self._route.begin()
        with self.timeline.phase("post"):
            flight = self._route.send(pooled, samples)
        self._answered.append(_Answered(flight, asked.own, asked.dense))

    def _complete(self) -> Predictions | None:
        """Finish the oldest answered iteration; None where this rank had no samples in it."""
        answered = self._answered.popleft()
        with self.timeline.phase("wait"):
            parts = answered.flight.wait()
        own, dense = answered.own, answered.dense
        if own is None or dense is None:
            answered.flight.release()
            return None
        pooled = self._finish.kept(own.batch) if self._keep_pooled else None
        with self.timeline.phase("dense"):
            logits, probabilities = self._finish.predict(dense, parts, own.batch, pooled)
        self.timeline.emitted.append(clock())
        del parts
        answered.flight.release()
        return Predictions(own.batch.first, logits, probabilities, pooled, own.batch.labels)
