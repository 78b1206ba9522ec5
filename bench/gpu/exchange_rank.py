"""Messages between GPUs, in every rank: by GpuExchange, and by libraries for host memory, copied there and back.

Commands are `load`, then for each size of messages `prepare`, any number of `block`s in turns, and `end`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.gpu import device as gpu
from bench.gpu.device import Clock
from bench.systems.base import Runtime
from bench.values import Pool
from blsrdma import GpuExchange
from blsrdma.gpu.arrays import GpuArray
from blsrdma.gpu.handle import GpuHandle

_VERIFIED = 3  # iterations

_clock: list[Clock] = []
_open: dict[str, Messages] = {}


class Messages(ABC):
    """`size` bytes from every rank to every other, iteration by iteration, from memory of the device into it."""

    def __init__(self, runtime: Runtime, clock: Clock, size: int) -> None:
        self.rank, self.ranks, self.clock, self.size = runtime.rank, runtime.ranks, clock, size
        self.counts = [0 if q == self.rank else size for q in range(self.ranks)]
        self.total = size * (self.ranks - 1)
        self.send = clock.device.memory(self.total)
        clock.device.fill(self.send.address, self.rank, self.total, clock.stream)
        clock.settle()

    @abstractmethod
    def turn(self) -> None:
        """Begin an iteration; complete one before, if there are more in flight than the lag allows."""

    @abstractmethod
    def finish(self) -> None:
        """Complete all, on the device, too."""

    @abstractmethod
    def received(self) -> list[NDArray[np.uint8]]:
        """The messages of one iteration that is done alone, by source."""

    def verify(self, seed: int) -> int:
        """A few iterations with contents; bytes that were compared. Raises WrongBytes."""
        pool = Pool(self.size, seed)
        for iteration in range(_VERIFIED):
            parts = [pool.message(self.rank, q, iteration, count) for q, count in enumerate(self.counts)]
            data = np.concatenate(parts)
            self.clock.device.copy(self.send.address, data.ctypes.data, data.nbytes, self.clock.stream)
            self.clock.settle()
            for source, message in enumerate(self.received()):
                if source != self.rank:
                    pool.check(message, source, self.rank, iteration, self.size)
        return _VERIFIED * self.total

    def facts(self) -> dict[str, Any]:
        """Paths and memory."""
        return {}

    def close(self) -> None:
        """Give everything back."""
        self.send.close()


class Bls(Messages):
    """A GpuExchange; the messages are waited for and given back, and nobody reads them."""

    def __init__(self, runtime: Any, clock: Clock, size: int, name: str, lag: int, path: str) -> None:
        super().__init__(runtime, clock, size)
        self.exchange = GpuExchange(
            runtime.store, self.rank, self.ranks, device=clock.device.ordinal, name=name, lag=lag, window_bytes=size,
            gpu_path=path, memory_limit=64 << 30,
        )  # fmt: skip
        self._array = GpuArray(self.send.address, (self.total,), np.dtype(np.uint8))
        self._handles: deque[GpuHandle] = deque()

    def turn(self) -> None:
        if len(self._handles) > self.exchange.lag:
            self._complete()
        self._handles.append(self.exchange.post(self._array, self.counts, stream=self.clock.stream))

    def _complete(self) -> None:
        handle = self._handles.popleft()
        handle.wait()
        handle.release()

    def finish(self) -> None:
        while self._handles:
            self._complete()
        self.clock.settle()

    def received(self) -> list[NDArray[np.uint8]]:
        handle = self.exchange.post(self._array, self.counts, stream=self.clock.stream)
        received = handle.wait()
        found = [np.empty(size, np.uint8) for size in received.sizes]
        for message, address in zip(found, received.addresses, strict=True):
            self.clock.device.copy(message.ctypes.data, address, message.nbytes, self.clock.stream)
        self.clock.settle()
        handle.release()
        return found

    def facts(self) -> dict[str, Any]:
        stats = self.exchange.stats()
        peers = [peer for peer in stats["peers"] if peer["rank"] != self.rank]
        return {
            "paths": sorted({peer["path"] for peer in peers}), "device_bytes": stats["device_bytes"],
            "memory_bytes": stats["memory_bytes"], "why": sorted({peer.get("why_staged", "") for peer in peers} - {""}),
        }  # fmt: skip

    def close(self) -> None:
        self.exchange.close()
        super().close()


class Staged(Messages):
    """Copied to page-locked host memory, exchanged there by another library, and copied back."""

    def __init__(self, runtime: Any, clock: Clock, size: int) -> None:
        super().__init__(runtime, clock, size)
        device = clock.device
        self.out, self._hosts = device.memory(self.total), [device.host_memory(self.total) for _ in range(2)]
        self.host_send, self.host_out = (gpu.host_bytes(host.host, self.total) for host in self._hosts)
        self.exchange_on_host = self._library(runtime)

    def _library(self, runtime: Any) -> Callable[[], object]:
        if hasattr(runtime, "comm"):
            from itertools import accumulate

            from mpi4py import MPI

            comm, starts = runtime.comm.Dup(), [0, *accumulate(self.counts[:-1])]
            send = [self.host_send, (self.counts, starts), MPI.BYTE]
            out = [self.host_out, (self.counts, starts), MPI.BYTE]
            return lambda: comm.Alltoallv(send, out)
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.PrefixStore("gpu", runtime.store), rank=self.rank,
                                    world_size=self.ranks)  # fmt: skip
        given, taken = torch.from_numpy(self.host_send), torch.from_numpy(self.host_out)
        return lambda: dist.all_to_all_single(taken, given, self.counts, self.counts)

    def turn(self) -> None:
        device, stream = self.clock.device, self.clock.stream
        device.copy(self._hosts[0].host, self.send.address, self.total, stream)
        self.clock.settle()
        self.exchange_on_host()
        device.copy(self.out.address, self._hosts[1].host, self.total, stream)

    def finish(self) -> None:
        self.clock.settle()

    def received(self) -> list[NDArray[np.uint8]]:
        self.turn()
        data = np.empty(self.total, np.uint8)
        self.clock.device.copy(data.ctypes.data, self.out.address, self.total, self.clock.stream)
        self.clock.settle()
        return np.split(data, np.cumsum(self.counts)[:-1])

    def close(self) -> None:
        self.out.close()
        for host in self._hosts:
            host.close()
        super().close()


class Nccl(Messages):
    """torch's NCCL backend, on GPUs of the ranks' own."""

    def __init__(self, runtime: Any, clock: Clock, size: int) -> None:
        import torch
        import torch.distributed as dist

        super().__init__(runtime, clock, size)
        torch.cuda.set_device(clock.device.ordinal)
        if not dist.is_initialized():
            dist.init_process_group("nccl", store=dist.PrefixStore("nccl", runtime.store), rank=self.rank,
                                    world_size=self.ranks)  # fmt: skip
        self._stream = torch.cuda.ExternalStream(clock.stream)  # type: ignore[no-untyped-call]
        self._given = torch.as_tensor(GpuArray(self.send.address, (self.total,), np.dtype(np.uint8)), device="cuda")
        self._taken = torch.empty_like(self._given)

    def turn(self) -> None:
        import torch
        import torch.distributed as dist

        with torch.cuda.stream(self._stream):
            dist.all_to_all_single(self._taken, self._given, self.counts, self.counts)

    def finish(self) -> None:
        self.clock.settle()

    def received(self) -> list[NDArray[np.uint8]]:
        self.turn()
        self.clock.settle()
        return np.split(self._taken.cpu().numpy(), np.cumsum(self.counts)[:-1])


def load(runtime: Runtime, _progress: Callable[[int], None], prepare: str) -> dict[str, Any]:
    """Open the device."""
    _clock[:] = [Clock(gpu.opened(prepare, runtime.rank))]
    return gpu.facts(_clock[0].device)


def reach(runtime: Any, _progress: Callable[[int], None], name: str) -> dict[str, Any]:
    """How the other ranks can be reached from here, and why not by ipc."""
    device = _clock[0].device.ordinal
    with GpuExchange(runtime.store, runtime.rank, runtime.ranks, device=device, name=name, window_bytes=4096) as one:
        peers = [peer for peer in one.stats()["peers"] if peer["rank"] != runtime.rank]
        return {"staged": [peer["why_staged"] for peer in peers if peer["path"] == "staged"]}


def copies(runtime: Runtime, _progress: Callable[[int], None], size: int, repeat: int) -> dict[str, Any]:
    """What a copy in the GPU's memory reaches while the other ranks do nothing."""
    return {"gbs": gpu.copy_gbs(_clock[0], size, repeat) if runtime.rank == 0 else []}


def prepare(
    runtime: Runtime, _progress: Callable[[int], None], system: str, size: int, name: str, seconds: float
) -> dict[str, Any]:
    """Open a system, prove its values, find out how many turns fill the time. Systems: "ipc 4" (path and lag), ..."""
    kind, _, lag = system.partition(" ")
    opened: Messages
    if kind in ("ipc", "staged"):
        opened = Bls(runtime, _clock[0], size, name, int(lag), kind)
    else:
        opened = Nccl(runtime, _clock[0], size) if kind == "nccl" else Staged(runtime, _clock[0], size)
    _open[system] = opened
    checked = opened.verify(1)
    ms = gpu.wall_ms(lambda: _turns(opened, 6)) / 6
    return {"checked": checked, "turns": max(6, min(2000, int(seconds * 1e3 / max(ms, 1e-3)))), "facts": opened.facts()}


def block(_runtime: Runtime, _progress: Callable[[int], None], system: str, turns: int) -> dict[str, Any]:
    """Milliseconds of one turn."""
    opened = _open[system]
    return {"ms": gpu.wall_ms(lambda: _turns(opened, turns)) / turns}


def end(_runtime: Runtime, _progress: Callable[[int], None]) -> dict[str, Any]:
    """Verify once more, and close."""
    checked = 0
    for system in list(_open):
        opened = _open.pop(system)
        checked += opened.verify(2)
        opened.close()
    return {"checked": checked}


def _turns(messages: Messages, turns: int) -> None:
    for _ in range(turns):
        messages.turn()
    messages.finish()
