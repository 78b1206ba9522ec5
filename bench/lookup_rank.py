"""The part of `python -m bench lookups` that runs in every rank: the same lookups through every system, in one loop.

Every rank has samples of its own (indices travel in every system), and a bag of every table for each of them. The loop:
complete iteration i - lag - 1, sleep the injected delay, begin iteration i. Values are checked before time is taken.
"""

from __future__ import annotations

import gc
import os
import signal
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bench.systems.ours import Ours
from blsrdma import Bags, Exchange, Lookup
from blsrdma.lookup_tables import hot_rows
from dlrm import delays

POOL = 32  # batches that are drawn, and used in turn
SAMPLED = 40  # others, in which hot rows are found
clock = time.monotonic_ns


@dataclass(frozen=True)
class Work:
    """What every system has to do. `owners`: of each table."""

    ranks: int
    samples: int  # of one rank in one iteration
    tables: int
    rows: int  # of a table
    dim: int
    pooling: int
    zipf: float  # exponent of the rows' popularity; 0: all alike
    owners: list[int]
    seed: int = 0

    def weight(self, table: int) -> Tensor:
        """The rows of a table, the same on every rank."""
        return _weight(table, self.rows, self.dim)

    def indices(self, rank: int, number: int) -> list[Tensor]:
        """A batch of a rank: per table samples * pooling row numbers."""
        random = np.random.default_rng([self.seed, rank, number])
        count = self.samples * self.pooling
        if not self.zipf:
            return [torch.from_numpy(random.integers(0, self.rows, count)) for _ in range(self.tables)]
        weights = np.arange(1, self.rows + 1, dtype=np.float64) ** -self.zipf
        bounds = np.cumsum(weights / weights.sum())
        drawn = []
        for table in range(self.tables):
            ranked = np.searchsorted(bounds, random.random(count)).clip(max=self.rows - 1)
            order = np.random.default_rng([self.seed, 7, table]).permutation(self.rows)  # popular rows lie anywhere
            drawn.append(torch.from_numpy(order[ranked]))
        return drawn

    def offsets(self) -> Tensor:
        return torch.arange(0, self.samples * self.pooling + 1, self.pooling)

    def wanted(self, rank: int, number: int) -> Tensor:
        """The right result, float32 [samples, tables, dim]."""
        offsets = self.offsets()
        return torch.stack(
            [functional.embedding_bag(i, self.weight(t), offsets, mode="sum", include_last_offset=True)
             for t, i in enumerate(self.indices(rank, number))], dim=1,
        )  # fmt: skip


@lru_cache(maxsize=64)
def _weight(table: int, rows: int, dim: int) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(1000 + table))


class Loop(ABC):
    """One system, ready."""

    def __init__(self, work: Work, rank: int, lag: int) -> None:
        self.work, self.rank, self.lag = work, rank, lag

    @abstractmethod
    def begin(self, number: int) -> None:
        """Start the next iteration with batch `number` of the pool."""

    @abstractmethod
    def complete(self) -> Tensor:
        """Finish the oldest one; [samples, tables, dim], in memory that is used again lag + 2 iterations later."""

    def idle(self) -> None:  # noqa: B027 - most have nothing to do
        """Something may be done for the others, before the next iteration."""

    @abstractmethod
    def close(self) -> dict[str, Any]:
        """Leave; what is worth telling."""


class Asking(Loop):
    """A Lookup."""

    def __init__(self, work: Work, rank: int, lag: int, store: Any, name: str, hot: int = 0, **settings: Any) -> None:
        super().__init__(work, rank, lag)
        own = {t: work.weight(t) for t, owner in enumerate(work.owners) if owner == rank}
        size = 1 << 20
        self.lookup = Lookup(
            own, store, rank, work.ranks, name=name, lag=lag, request_bytes=size, response_bytes=size,
            close_timeout=20, **settings,
        )  # fmt: skip
        if hot:  # found in batches that are not among those that are measured
            sample = [work.indices(rank, POOL + n) for n in range(SAMPLED)]
            for table, owner in enumerate(work.owners):
                if owner != rank:
                    self.lookup.keep(table, hot_rows(torch.cat([batch[table] for batch in sample]).numpy(), hot))
        offsets = work.offsets()
        self.bags = [[Bags(t, i, offsets) for t, i in enumerate(work.indices(rank, n))] for n in range(POOL)]
        self.outs = [torch.empty(work.samples, work.tables, work.dim) for _ in range(lag + 2)]
        self.open: deque[tuple[Any, Tensor]] = deque()
        self.count = 0

    def begin(self, number: int) -> None:
        slot = self.count % len(self.outs)
        self.count += 1
        self.open.append((self.lookup.ask(self.bags[number], self.outs[slot]), self.outs[slot]))

    def complete(self) -> Tensor:
        asked, out = self.open.popleft()
        asked.wait()
        return out

    def close(self) -> dict[str, Any]:
        stats = self.lookup.stats()
        self.lookup.finish()
        self.lookup.close()
        asked = [peer["asked"] for peer in stats["peers"] if peer["rank"] != self.rank]
        counts = {what: sum(each[what] for each in asked) for what in ("rows", "fetched", "kept", "cached", "repeated")}
        carried = sum(each["request_bytes"] + each["response_bytes"] for each in asked)
        return {"paths": sorted({peer["path"] for peer in stats["peers"]}), "counts": counts, "carried": carried}


class Collective(Loop):
    """Two exchanges: bags to the owners, pooled rows back. Owners answer in their own loops, as soon as they can."""

    def __init__(self, work: Work, rank: int, lag: int, store: Any, name: str) -> None:
        super().__init__(work, rank, lag)
        ranks, n = work.ranks, work.samples
        self.mine = [t for t, owner in enumerate(work.owners) if owner == rank]
        self.weights = [work.weight(t) for t in self.mine]
        per = [work.owners.count(q) for q in range(ranks)]
        query, row = n * work.pooling, n * work.dim
        self.asking = Exchange(
            store, rank, ranks, name=name + "/q", lag=lag, window_bytes=max(64, query * 4 * max(per))
        )
        self.rows = Exchange(store, rank, ranks, name=name + "/r", lag=lag, window_bytes=max(64, row * 4 * max(per)))
        order = [t for q in range(ranks) for t, owner in enumerate(work.owners) if owner == q]
        self.order = order
        self.counts = [query * count for count in per]
        self.back = [row * len(self.mine)] * ranks
        self.queries = [
            torch.cat([work.indices(rank, number)[t] for t in order]).to(torch.int32) for number in range(POOL)
        ]
        self.offsets = torch.arange(0, ranks * query + 1, work.pooling)
        self.buffers = [torch.empty(ranks, len(self.mine), n, work.dim) for _ in range(lag + 2)]
        self.outs = [torch.empty(n, work.tables, work.dim) for _ in range(lag + 2)]
        self.asked: deque[Any] = deque()
        self.answered: deque[Any] = deque()
        self.count = self.done = 0

    def begin(self, number: int) -> None:
        self.asking.begin()
        self.asked.append(self.asking.post(self.queries[number], self.counts))
        self.idle()

    def idle(self) -> None:
        while self.asked and len(self.answered) <= self.lag and self.asked[0].ready():
            self._answer()

    def _answer(self) -> None:
        work = self.work
        buffer = self.buffers[self.count % len(self.buffers)]
        self.count += 1
        with self.asked.popleft() as received:
            parts = [part.view(len(self.mine), -1) for part in received]
            for k, weight in enumerate(self.weights):
                indices = torch.cat([part[k] for part in parts])
                found = functional.embedding_bag(
                    indices, weight, self.offsets.to(torch.int32), mode="sum", include_last_offset=True
                )
                buffer[:, k] = found.view(work.ranks, work.samples, work.dim)
            del parts
        self.rows.begin()
        self.answered.append(self.rows.post(buffer.view(-1), self.back))

    def complete(self) -> Tensor:
        if not self.answered:
            self.asked[0].wait()
            self._answer()
        work, out = self.work, self.outs[self.done % len(self.outs)]
        self.done += 1
        at = 0
        with self.answered.popleft() as received:
            for part in received:
                block = part.view(-1, work.samples, work.dim)
                for k in range(len(block)):
                    out[:, self.order[at + k]] = block[k]
                at += len(block)
                del block
            del part
        return out

    def close(self) -> dict[str, Any]:
        paths = sorted({peer["path"] for peer in self.rows.stats()["peers"]})
        self.asking.close()
        self.rows.close()
        return {"paths": paths}


def opened(runtime: Ours, system: str, work: Work, lag: int, name: str, settings: dict[str, Any]) -> Loop:
    """A system by its name."""
    if system == "alltoallv":
        return Collective(work, runtime.rank, lag, runtime.store, name)
    return Asking(work, runtime.rank, lag, runtime.store, name, mode=system, **settings)


def check(loop: Loop) -> int:
    """Every bit of some iterations; bytes that were compared."""
    checked, open_ = 0, deque[int]()

    def one() -> int:
        found, wanted = loop.complete(), loop.work.wanted(loop.rank, open_.popleft())
        if not torch.equal(found.view(torch.int32), wanted.view(torch.int32)):
            raise AssertionError("a pooled row is not right")
        return found.nbytes

    for number in range(2 * (loop.lag + 1) + 1):
        if len(open_) > loop.lag:
            checked += one()
        open_.append(number % POOL)
        loop.begin(number % POOL)
    while open_:
        checked += one()
    return checked


def timed(
    loop: Loop, iterations: int, delay: Callable[[int], float], stop: Callable[[int], bool] = lambda _: False
) -> dict[str, Any]:
    """The loop; times in nanoseconds. Latency is from the begin of an iteration until its rows are complete."""
    begun: deque[int] = deque()
    latency, slept = [], []
    collecting = gc.isenabled()
    gc.disable()
    started = clock()
    done = 0

    def complete() -> None:
        nonlocal done
        loop.complete()
        latency.append(clock() - begun.popleft())
        done += 1

    try:
        for i in range(iterations):
            if len(begun) > loop.lag:
                complete()
            seconds = delay(i)
            before = clock()
            if seconds > 0:
                time.sleep(seconds)
            slept.append(clock() - before if seconds > 0 else 0)
            begun.append(clock())
            loop.begin(i % POOL)
            if stop(i):
                break
        while begun:
            complete()
    finally:
        if collecting:
            gc.enable()
    return {"ns": clock() - started, "latency": latency, "slept": slept, "iterations": done}


def meet(runtime: Ours, what: str) -> None:
    """All ranks, at about the same time."""
    runtime.store.add(what, 1)
    while runtime.store.add(what, 0) < runtime.ranks:
        time.sleep(0.0005)


def measure(
    runtime: Ours,
    progress: Callable[[int], None],  # noqa: ARG001 - a command's
    system: str,
    work: dict[str, Any],
    lag: int,
    name: str,
    iterations: int,
    delay: str,
    seed: int,
    settings: dict[str, Any],
    verify: bool,
) -> dict[str, Any]:
    """One system in one case; collective."""
    job = Work(**work)
    plan = delays.parse(delay, seed)
    loop = opened(runtime, system, job, lag, name, settings)
    checked = check(loop) if verify else 0
    meet(runtime, name + "/warm")
    timed(loop, max(3 * POOL, iterations // 10), lambda _: 0.0)  # every batch more than once: what is cached is cached
    meet(runtime, name + "/timed")
    found = timed(loop, iterations, lambda i: plan.seconds(runtime.rank, i, runtime.ranks))
    meet(runtime, name + "/done")
    return found | {"checked": checked} | loop.close()


def outage(
    runtime: Ours,
    progress: Callable[[int], None],  # noqa: ARG001 - a command's
    system: str,
    work: dict[str, Any],
    lag: int,
    name: str,
    seconds: float,
    stopped: bool,
    settings: dict[str, Any],
) -> dict[str, Any]:
    """The last rank asks nothing for some seconds: its process is stopped, or it just sleeps. What the others do."""
    job = Work(**work)
    victim = runtime.ranks - 1
    store = runtime.store
    store.set(f"{name}/pid{runtime.rank}", str(os.getpid()))
    loop = opened(runtime, system, job, lag, name, settings)
    check(loop)
    meet(runtime, name + "/ready")
    found: dict[str, Any] = {"ns": 1, "iterations": 0}
    if runtime.rank == victim:
        store.get(f"{name}/over")
    else:
        if runtime.rank == 0 and stopped:
            os.kill(int(store.get(f"{name}/pid{victim}")), signal.SIGSTOP)
        end = clock() + int(seconds * 1e9)
        found = timed(loop, 1 << 40, lambda _: 0.0, lambda _: clock() > end)
        if store.add(name + "/ended", 1) == runtime.ranks - 1:
            os.kill(int(store.get(f"{name}/pid{victim}")), signal.SIGCONT)
            store.set(f"{name}/over", "1")
    meet(runtime, name + "/done")
    del found["ns"]
    return {"iterations": found["iterations"]} | loop.close()
