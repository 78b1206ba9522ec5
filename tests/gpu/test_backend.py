"""The backend's lane for GPU memory, on the simulated driver; CUDA tensors themselves need a GPU."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch
import torch.distributed as dist

from blsrdma import Options
from blsrdma.errors import CountsError, MessageTooLarge, PeerTimeout
from blsrdma.gpu.arrays import GpuArray
from blsrdma.gpu.backend_lane import GpuLane
from blsrdma.gpu.device import open_device
from tests.backend.groups import group
from tests.gpu.rank import start
from tests.ranks import run_ranks


class Tensor(GpuArray):
    """As much of a CUDA tensor as a lane looks at."""

    def data_ptr(self) -> int:
        return self.address

    def is_contiguous(self) -> bool:
        return True

    def is_neg(self) -> bool:
        return False


class Memory:
    """A vector on the device."""

    def __init__(self, count: int) -> None:
        self.device, self.count = open_device(0), count
        self.memory = self.device.memory(max(1, 4 * count))
        self.tensor = Tensor(self.memory.address, (count,), np.dtype(np.int32), self.memory)

    def write(self, values) -> Tensor:
        array = np.ascontiguousarray(values, np.int32)
        self.device.copy(self.memory.address, array.ctypes.data, array.nbytes)
        return self.tensor

    def read(self) -> list[int]:
        out = (ctypes.c_int32 * self.count)()
        self.device.copy(ctypes.addressof(out), self.memory.address, 4 * self.count)
        assert self.device.synchronize(0, 10**10)
        return list(out)


def _exact(rank, world, store, lag):
    start()
    lane = GpuLane(store, rank, world, 20.0, device=0, lag=lag, window_bytes=256)
    flying = []
    for i in range(12):
        counts = [(rank + 2 * q + i) % 4 for q in range(world)]
        expected = [(q + 2 * rank + i) % 4 for q in range(world)]
        send = Memory(sum(counts)).write([1000 * i + 10 * rank] * sum(counts))
        if i % 3 == 2:
            out = Memory(sum(expected))
            lane.run(send, counts, out.tensor, expected)
            flying.append((None, [out], i, expected))
        elif i % 3 == 1:
            outs = [Memory(count) for count in expected]
            flying.append((lane.post(send, counts, [out.tensor for out in outs], expected), outs, i, expected))
        else:
            out = Memory(sum(expected))
            flying.append((lane.post(send, counts, out.tensor, expected), [out], i, expected))
    for operation, outs, i, expected in flying:
        if operation is not None:
            lane.wait(operation)
            assert lane.poll(operation)
        got = [value for out in outs for value in out.read()]
        assert got == [1000 * i + 10 * q for q in range(world) for _ in range(expected[q])]
    lane.close()


@pytest.mark.parametrize("lag", [0, 2])
def test_exact(where, lag):
    run_ranks(_exact, 3, lag, env={"SIMULATED_CUDA_DELAY_US": "100", **where})


def _errors(rank, world, store):
    start()
    lane = GpuLane(store, rank, world, 20.0, device=0, lag=0, window_bytes=64)
    out = Memory(2)
    send = Memory(2).write([rank, rank])
    with pytest.raises(CountsError, match="sent 1 items to rank"):
        lane.run(send, [1, 1], out.tensor, [2, 0] if rank else [0, 2])
    lane.run(send, [1, 1], out.tensor, [1, 1])
    assert out.read() == [0, 1]
    large = Memory(60).write(np.zeros(60))
    with pytest.raises(MessageTooLarge):
        lane.run(large, [30, 30], large, [30, 30])
    if rank == 0:
        with pytest.raises(PeerTimeout):
            lane.run(send, [1, 1], out.tensor, [1, 1], timeout=0.2)
        store.set("tried", "")
    else:
        store.wait(["tried"])
    lane.close()


def test_errors(where):
    run_ranks(_errors, 2, env=where)


def _cuda_tensors(rank, world, store):
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    with group(rank, world, store, lag=2):
        flying = []
        for i in range(20):
            counts = [(rank + q + i) % 5 for q in range(world)]
            expected = [(q + rank + i) % 5 for q in range(world)]
            rows = torch.full((sum(counts), 16), 100.0 * i + rank, device=device)
            out = torch.empty(sum(expected), 16, device=device)
            if i % 2:
                out = torch.empty(16, sum(expected), device=device).t()  # not contiguous
            flying.append((dist.all_to_all_single(out, rows, expected, counts, async_op=True), out, expected, i))
            if len(flying) > 3:
                work, out, expected, number = flying.pop(0)
                work.wait()
                assert out[:, 0].tolist() == [100.0 * number + q for q in range(world) for _ in range(expected[q])]
        for work, *_ in flying:
            work.wait()
        ins = [torch.full((rank + q + 1,), rank, device=device, dtype=torch.bfloat16) for q in range(world)]
        outs = [torch.empty(rank + q + 1, device=device, dtype=torch.bfloat16) for q in range(world)]
        dist.all_to_all(outs, ins)
        assert [out.tolist() for out in outs] == [[float(q)] * (rank + q + 1) for q in range(world)]
        assert dist.group.WORLD.exchange is None  # nothing went through host memory
    return str(Options(lag=2))


@pytest.mark.gpu
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_cuda_tensors(ranks):
    run_ranks(_cuda_tensors, ranks, timeout=120.0)
