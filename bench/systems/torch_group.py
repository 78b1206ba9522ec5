"""torch.distributed's all_to_all_single: bls and gloo on host memory, NCCL on GPUs."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from bench.systems.base import Bytes, Job, Runtime, System, pieces
from blsrdma.backend import Options


class TorchGroup(Runtime):
    """Ranks of one process group."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        torch.set_num_threads(1)
        self.rank, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.device = torch.device("cuda", self.rank) if name == "nccl" else torch.device("cpu")
        self._server: TCPStore | None = None
        if self.rank == 0:
            self._server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def hello(self) -> dict[str, Any]:
        return {"port": self._server.port} if self._server else {}

    def join(self, hellos: list[dict[str, Any]]) -> dict[str, Any]:
        if self.name == "nccl":
            torch.cuda.set_device(self.device)
        store = TCPStore("127.0.0.1", hellos[0]["port"], is_master=False, timeout=timedelta(seconds=120))
        backend = self.name.removesuffix("-torch")
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.ranks)
        return {"torch": torch.__version__, "numpy": np.__version__}

    def open(self, job: Job) -> System:
        kind = NonBlocking if job.system.endswith("-nb") else Blocking
        group = None
        if self.name == "bls-torch":  # a group has one lag
            group = dist.new_group(pg_options=Options(lag=job.lag, window_bytes=job.largest))
        return kind(job if job.copy_self else job.without_self(), self.device, group)

    def close(self) -> None:
        dist.destroy_process_group()


class _AllToAll(System):
    def __init__(self, job: Job, device: torch.device, group: dist.ProcessGroup | None, depth: int) -> None:
        super().__init__(job)
        self.group = group  # None: that of all
        self.depth = depth
        self.device = device
        self.sent, self.received = job.sent(), job.received()
        sends = [_zeros(max(map(sum, self.sent)), device) for _ in range(depth)]
        outs = [_zeros(max(map(sum, self.received)), device) for _ in range(depth)]
        self.sends = [[buffer[: sum(counts)] for counts in self.sent] for buffer in sends]
        self.outs = [[buffer[: sum(counts)] for counts in self.received] for buffer in outs]
        self.messages: list[list[list[Bytes]]] = []
        if device.type == "cpu":
            self.messages = [[pieces(buffer.numpy(), counts) for counts in self.received] for buffer in outs]

    def start(self, i: int, asynchronous: bool) -> dist.Work | None:
        slot, phase = i % self.depth, i % self.phases
        send = self.sends[slot][phase]
        if self.produce is not None:
            host = np.empty(len(send), np.uint8) if send.is_cuda else send.numpy()
            self.produce(i, host)
            if send.is_cuda:
                send.copy_(torch.from_numpy(host))
        work: dist.Work | None = dist.all_to_all_single(
            self.outs[slot][phase], send, self.received[phase], self.sent[phase], self.group, asynchronous
        )
        return work

    def completed(self, i: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.consume is not None:
            slot, phase = i % self.depth, i % self.phases
            if self.device.type == "cuda":
                self.consume(i, pieces(self.outs[slot][phase].cpu().numpy(), self.received[phase]))
            else:
                self.consume(i, self.messages[slot][phase])

    def close(self) -> None:
        self.sends, self.outs, self.messages = [], [], []
        if self.group is not None:
            dist.destroy_process_group(self.group)


class Blocking(_AllToAll):
    """One operation, complete when the call returns."""

    def __init__(self, job: Job, device: torch.device, group: dist.ProcessGroup | None) -> None:
        super().__init__(job, device, group, depth=1)

    def turn(self, i: int) -> None:
        self.start(i, asynchronous=False)
        self.completed(i)

    def finish(self, i: int) -> None:
        pass


class NonBlocking(_AllToAll):
    """lag + 1 operations in flight."""

    def __init__(self, job: Job, device: torch.device, group: dist.ProcessGroup | None) -> None:
        super().__init__(job, device, group, depth=job.lag + 1)
        self._works: list[dist.Work | None] = [None] * self.depth

    def turn(self, i: int) -> None:
        slot = i % self.depth
        work = self._works[slot]
        if work is not None:
            work.wait()
            self.completed(i - self.depth)
        self._works[slot] = self.start(i, asynchronous=True)

    def finish(self, i: int) -> None:
        for j in range(i - self.depth, i):
            work = self._works[j % self.depth]
            if work is not None:
                work.wait()
                self.completed(j)
            self._works[j % self.depth] = None


def _zeros(size: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8, device=device)
