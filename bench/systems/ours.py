"""blsrdma, through its public interface."""

from __future__ import annotations

import os
import re
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.distributed import TCPStore

import blsrdma
from bench.systems.base import Job, Runtime, System, pieces
from blsrdma import Exchange

if TYPE_CHECKING:
    from blsrdma import Handle


class Ours(Runtime):
    """Ranks that can open Exchanges."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        torch.set_num_threads(1)
        self.rank, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self._server: TCPStore | None = None
        if self.rank == 0:
            self._server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.store: TCPStore

    def hello(self) -> dict[str, Any]:
        return {"port": self._server.port} if self._server else {}

    def join(self, hellos: list[dict[str, Any]]) -> dict[str, Any]:
        from blsrdma.ucx import version

        self.store = TCPStore("127.0.0.1", hellos[0]["port"], is_master=False, timeout=timedelta(seconds=120))
        return {"blsrdma": blsrdma.__version__, "UCX": version, "torch": torch.__version__, "numpy": np.__version__}

    def open(self, job: Job) -> System:
        kinds: dict[str, type[Views]] = {"bls": Views, "bls-copy": CopyOut, "bls-wait": WaitOnly}
        return kinds[job.system](job, self.store)


class Views(System):
    """Takes a view of every message, and gives the windows back before the next post."""

    def __init__(self, job: Job, store: TCPStore, copy_self: bool | None = None) -> None:
        super().__init__(job)
        began = time.perf_counter()
        self.exchange = Exchange(
            store, job.rank, job.ranks, name=job.name, lag=job.lag, window_bytes=job.largest,
            copy_self=job.copy_self if copy_self is None else copy_self,
        )  # fmt: skip
        self._setup_seconds = time.perf_counter() - began
        self._counts = [np.array(counts, np.int64) for counts in job.sent()]
        buffers = [np.zeros(max(map(sum, job.sent())), np.uint8) for _ in range(self.depth)]
        self._sends = [[buffer[: sum(counts)] for counts in job.sent()] for buffer in buffers]
        self._handles: list[Handle | None] = [None] * self.depth

    def turn(self, i: int) -> None:
        slot = i % self.depth
        handle = self._handles[slot]
        if handle is not None:
            self.complete(handle)
        send = self._sends[slot][i % self.phases]
        if self.produce is not None:  # who writes a buffer again has to ask whether it has been sent
            while handle is not None and not handle.sent():
                time.sleep(0)
            self.produce(i, send)
        self._handles[slot] = self.exchange.post(send, self._counts[i % self.phases])

    def complete(self, handle: Handle) -> None:
        messages = list(handle.wait())
        if self.consume is not None:
            self.consume(handle.iteration, messages)
        handle.release()

    def finish(self, i: int) -> None:
        for slot in range(i - self.depth, i):
            handle = self._handles[slot % self.depth]
            if handle is not None:
                self.complete(handle)
            self._handles[slot % self.depth] = None

    def facts(self) -> dict[str, Any]:
        stats = self.exchange.stats()
        paths = {f"{p['path']} ({p['transport']})" if p["transport"] else p["path"] for p in stats["peers"]}
        return {
            "paths": sorted(paths - {"self"}),
            "memory_bytes": stats["memory_bytes"],
            "setup_seconds": self._setup_seconds,
            "resident_bytes": _resident(),
            "max_lead": stats["max_lead"],
        }

    def close(self) -> None:
        self.exchange.close()


class CopyOut(Views):
    """Has the messages put into one array that was there before, and their sizes checked, as MPI does; like a peer, it
    sends itself nothing unless all do. The backend of torch.distributed does just this."""

    def __init__(self, job: Job, store: TCPStore) -> None:
        super().__init__(job if job.copy_self else job.without_self(), store, copy_self=False)
        self._expected = [np.array(counts, np.int64) for counts in self.job.received()]
        out = np.zeros(max(map(sum, self.job.received())), np.uint8)
        self._outs = [out[: counts.sum()] for counts in self._expected]
        self._messages = [pieces(out, counts) for counts in self.job.received()]

    def complete(self, handle: Handle) -> None:
        phase = handle.iteration % self.phases
        handle.wait(out=self._outs[phase], counts=self._expected[phase])
        if self.consume is not None:
            self.consume(handle.iteration, self._messages[phase])
        handle.release()


class WaitOnly(Views):
    """Looks at no message unless they are verified."""

    def complete(self, handle: Handle) -> None:
        if self.consume is not None:
            super().complete(handle)
        else:
            handle.wait()
            handle.release()


def _resident() -> int:
    """Of this process, shared pages divided among those who share them."""
    found = re.search(r"^Pss:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)
    return int(found[1]) << 10 if found else 0
