"""MPI through mpi4py: MPI_Alltoallv, and MPI_Ialltoallv with several in flight. Needs numpy and mpi4py, nothing
else."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import mpi4py
import numpy as np
from mpi4py import MPI  # initialises MPI

from bench.systems.base import Bytes, Job, Runtime, System, pieces


class Mpi(Runtime):
    """Ranks of MPI_COMM_WORLD."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.comm = MPI.COMM_WORLD
        self.rank, self.ranks = self.comm.Get_rank(), self.comm.Get_size()

    def join(self, hellos: list[dict[str, Any]]) -> dict[str, Any]:  # noqa: ARG002  (MPI's launcher has done it)
        library = MPI.Get_library_version().splitlines()[0].strip(" \0").split(", package")[0]
        version = " ".join(library.replace("Version:", "").split())
        return {"MPI": version, "mpi4py": mpi4py.__version__, "numpy": np.__version__}

    def open(self, job: Job) -> System:
        kind = NonBlocking if job.system.endswith("-nb") else Blocking
        return kind(job if job.copy_self else job.without_self(), self.comm)

    def close(self) -> None:
        MPI.Finalize()


class _AllToAllV(System):
    def __init__(self, job: Job, comm: MPI.Comm, depth: int) -> None:
        super().__init__(job)
        self.depth = depth
        self.comm = comm.Dup()
        # Everything a call needs is made here. (Lists of counts are what mpi4py converts fastest.)
        self.outs = [np.zeros(max(map(sum, job.received())), np.uint8) for _ in range(depth)]
        self.messages = [[pieces(buffer, counts) for counts in job.received()] for buffer in self.outs]
        buffers = [np.zeros(max(map(sum, job.sent())), np.uint8) for _ in range(depth)]
        self.sends = [[buffer[: sum(counts)] for counts in job.sent()] for buffer in buffers]
        self.send_specs = [[_spec(buffer, counts) for counts in job.sent()] for buffer in buffers]
        self.out_specs = [[_spec(buffer, counts) for counts in job.received()] for buffer in self.outs]

    def prepare(self, i: int) -> None:
        if self.produce is not None:
            self.produce(i, self.sends[i % self.depth][i % self.phases])

    def completed(self, i: int) -> None:
        if self.consume is not None:
            self.consume(i, self.messages[i % self.depth][i % self.phases])

    def close(self) -> None:
        self.comm.Free()


class Blocking(_AllToAllV):
    """One operation, complete when the call returns."""

    def __init__(self, job: Job, comm: MPI.Comm) -> None:
        super().__init__(job, comm, depth=1)

    def turn(self, i: int) -> None:
        if self.produce is not None:
            self.prepare(i)
        phase = i % self.phases
        self.comm.Alltoallv(self.send_specs[0][phase], self.out_specs[0][phase])
        if self.consume is not None:
            self.completed(i)

    def finish(self, i: int) -> None:
        pass


class NonBlocking(_AllToAllV):
    """lag + 1 operations in flight."""

    def __init__(self, job: Job, comm: MPI.Comm) -> None:
        super().__init__(job, comm, depth=job.lag + 1)
        self._requests: list[Any] = [None] * self.depth

    def turn(self, i: int) -> None:
        slot, phase = i % self.depth, i % self.phases
        request = self._requests[slot]
        if request is not None:
            request.Wait()
            if self.consume is not None:
                self.completed(i - self.depth)
        if self.produce is not None:
            self.prepare(i)
        self._requests[slot] = self.comm.Ialltoallv(self.send_specs[slot][phase], self.out_specs[slot][phase])

    def finish(self, i: int) -> None:
        for j in range(i - self.depth, i):
            request = self._requests[j % self.depth]
            if request is not None:
                request.Wait()
                self.completed(j)
            self._requests[j % self.depth] = None


def _spec(buffer: Bytes, counts: list[int]) -> list[Any]:
    return [buffer, (counts, [0, *accumulate(counts[:-1])]), MPI.BYTE]
