"""Libraries that can do a Collective's all-to-all: torch.distributed with any of its backends, and MPI (mpi4py)."""

from __future__ import annotations

import os
import sys
import time
from abc import ABC, abstractmethod
from contextlib import contextmanager
from datetime import timedelta
from itertools import accumulate
from math import isinf
from typing import TYPE_CHECKING, Any

import torch

from dlrm import mpiexec
from dlrm.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor
    from torch.distributed import Store

# --dist-backend. "bls" is not here: a run over it uses blsrdma.Exchange.
BACKENDS = {"gloo": "gloo", "nccl": "nccl", "torch-bls": "bls", "mpi": "mpi"}
_FOREVER = timedelta(days=365)
_POLLS_BEFORE_YIELD = 1000


class Pending(ABC):
    """An all-to-all under way."""

    @abstractmethod
    def done(self) -> bool:
        """Whether it is complete; raises where it has failed."""

    @abstractmethod
    def wait(self, timeout: float) -> None:
        """Return when it is complete; raises where it has failed or the time, in seconds, is over."""


class Transport(ABC):
    """One order of operations among all ranks."""

    name: str
    rank: int
    ranks: int

    @abstractmethod
    def start(self, out: Tensor, expected: list[int], send: Tensor, counts: list[int]) -> Pending:
        """Begin an all-to-all of vectors; both belong to it until it is complete."""


def refuse(backend: str, ranks: int) -> None:
    """Raise OptionError where `ranks` ranks cannot run over a backend here."""
    if backend == "nccl" and (gpus := torch.cuda.device_count()) < _on_this_host(ranks):
        raise OptionError(f"--dist-backend nccl wants a GPU for each rank: {_on_this_host(ranks)} ranks, {gpus} GPUs")
    if backend == "mpi":
        mpiexec.require()


@contextmanager
def opened(
    backend: str, store: Store | None, rank: int, ranks: int, timeout: float
) -> Iterator[Callable[[int, int], Transport]]:
    """What makes transports, as long as the block lasts, for a lag and messages of so many bytes; all ranks make the
    same ones in the same order."""
    refuse(backend, ranks)
    if backend == "mpi":
        ours = "mpi4py.MPI" not in sys.modules  # who has brought MPI up takes it down
        yield _mpi(rank, ranks)
        if ours:
            _finalize_mpi()  # not after an error, when the others would be waited for: mpiexec ends them
        return
    import torch.distributed as dist

    from blsrdma import Options

    limit = _FOREVER if isinf(timeout) else timedelta(seconds=timeout)
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", rank)))
    dist.init_process_group(BACKENDS[backend], store=store, rank=rank, world_size=ranks, timeout=limit)
    kind = _Nccl if backend == "nccl" else _Torch

    def make(lag: int, window_bytes: int) -> Transport:
        options = Options(lag=lag, window_bytes=window_bytes) if backend == "torch-bls" else None
        return kind(backend, dist.new_group(timeout=limit, pg_options=options))

    try:
        yield make
    finally:
        dist.destroy_process_group()


def _on_this_host(ranks: int) -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", ranks))


# --- torch.distributed


class _Torch(Transport):
    def __init__(self, name: str, group: Any) -> None:
        self.name, self._group = name, group
        self.rank, self.ranks = group.rank(), group.size()

    def start(self, out: Tensor, expected: list[int], send: Tensor, counts: list[int]) -> Pending:
        work = torch.distributed.all_to_all_single(out, send, expected, counts, self._group, async_op=True)
        return _TorchPending(work, lambda: None)


class _Nccl(_Torch):
    """Through GPU memory, and back."""

    def start(self, out: Tensor, expected: list[int], send: Tensor, counts: list[int]) -> Pending:
        there = torch.empty_like(out, device="cuda")
        work = torch.distributed.all_to_all_single(there, send.to("cuda"), expected, counts, self._group, async_op=True)
        return _TorchPending(work, lambda: out.copy_(there))


class _TorchPending(Pending):
    def __init__(self, work: Any, land: Callable[[], Any]) -> None:
        self._work, self._land, self._over = work, land, False

    def done(self) -> bool:
        if not self._over and self._work.is_completed():
            self.wait(0.0)
        return self._over

    def wait(self, timeout: float) -> None:
        if not self._over:
            if timeout > 0 and not isinf(timeout):
                self._work.wait(timedelta(seconds=timeout))
            else:
                self._work.wait()
            self._land()
            self._over = True


# --- MPI


class _Mpi(Transport):
    name = "mpi"

    def __init__(self, comm: Any) -> None:
        self._comm = comm
        self.rank, self.ranks = comm.Get_rank(), comm.Get_size()

    def start(self, out: Tensor, expected: list[int], send: Tensor, counts: list[int]) -> Pending:
        size = send.element_size()
        request = self._comm.Ialltoallv(_bytes(send, counts, size), _bytes(out, expected, size))
        return _MpiPending(request)


class _MpiPending(Pending):
    def __init__(self, request: Any) -> None:
        self._request = request

    def done(self) -> bool:
        return bool(self._request.Test())

    def wait(self, timeout: float) -> None:
        end, polls = time.monotonic() + timeout, 0
        while not self._request.Test():
            polls += 1
            if polls % _POLLS_BEFORE_YIELD == 0:
                if time.monotonic() > end:
                    raise TimeoutError(f"MPI_Ialltoallv is not complete after {timeout:g} s")
                os.sched_yield()


def _bytes(tensor: Tensor, counts: list[int], size: int) -> list[Any]:
    from mpi4py import MPI

    sizes = [count * size for count in counts]
    return [tensor.numpy().view("u1"), (sizes, [0, *accumulate(sizes[:-1])]), MPI.BYTE]


def _mpi(rank: int, ranks: int) -> Callable[[int, int], Transport]:
    import mpi4py

    mpi4py.rc.finalize = False
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    if (world.Get_rank(), world.Get_size()) != (rank, ranks):
        raise OptionError(f"--dist-backend mpi: MPI has {world.Get_size()} ranks, wanted {ranks}: start it by mpiexec")
    return lambda *_: _Mpi(world.Dup())


def _finalize_mpi() -> None:
    from mpi4py import MPI

    MPI.Finalize()
