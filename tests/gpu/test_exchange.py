"""GpuExchange on the simulated driver: the same bits whatever the path, the lag and the timing of the device."""

from __future__ import annotations

import itertools
import time
from collections import deque

import numpy as np
import pytest

from blsrdma import GpuExchange
from blsrdma.errors import (
    WindowHeld,
)
from blsrdma.gpu import compiler, tables
from blsrdma.gpu.arrays import GpuArray
from blsrdma.gpu.device import open_device
from blsrdma.trace import load
from blsrdma.ucx import native
from tests.gpu import calls as cu
from tests.gpu import simulated
from tests.gpu.memory import pinned, vector
from tests.gpu.rank import start
from tests.ranks import run_ranks

WINDOW = 4096
NEVER = -1


def items(iteration: int, source: int, target: int) -> int:
    """How many int32 `source` sends to `target`: none, a few, as many as fit."""
    kind = (iteration * 7 + source * 3 + target * 5) % 11
    return 0 if kind == 0 else WINDOW // 4 if kind == 1 else 1 + (iteration * 31 + source * 17 + target * 13) % 900


def message(iteration: int, source: int, target: int) -> np.ndarray:
    n = items(iteration, source, target)
    return (np.arange(n, dtype=np.int32) * 7 + iteration * 1_000_003 + source * 10_007 + target * 101).astype(np.int32)


class Loop:
    """An inference loop whose device work is copies: what is sent is produced late, what is received is read late."""

    def __init__(self, exchange: GpuExchange, iterations: int, placed: bool, idles: int = 0) -> None:
        self.exchange, self.iterations, self.placed, self.idles = exchange, iterations, placed, idles
        self.device = open_device(exchange.device)
        self.producing, self.consuming = self.device.stream(), self.device.stream()
        room = exchange.world_size * WINDOW + 1
        self.buffers = [self.device.memory(room) for _ in range(exchange.lag + 2)]
        self.handles: deque = deque()
        self.last: dict[int, object] = {}
        self.results: list[list[np.ndarray]] = []
        self.sources: list[np.ndarray] = []  # alive until the device has read them

    def run(self) -> None:
        exchange = self.exchange
        for i in range(self.iterations):
            assert exchange.begin() == i
            if len(self.handles) > exchange.lag:
                self.complete()
            self.post(i)
        while self.handles:
            self.complete()
        assert self.device.synchronize(self.consuming.address, 20_000_000_000)
        for i, received in enumerate(self.results):
            for source, got in enumerate(received):
                np.testing.assert_array_equal(got, message(i, source, exchange.rank), f"iteration {i} from {source}")

    def post(self, i: int) -> None:
        exchange, device, stream = self.exchange, self.device, self.producing.address
        counts = [items(i, exchange.rank, q) for q in range(exchange.world_size)]
        parts = [pinned(device, 4 * count, np.int32) for count in counts]
        for q, part in enumerate(parts):
            part[:] = message(i, exchange.rank, q)
        self.sources.extend(parts)
        if self.placed:
            placement = exchange.place(counts, dtype=np.int32, stream=stream)
            for part, address in zip(parts, placement.addresses, strict=True):
                device.copy(address, part.ctypes.data, part.nbytes, stream)
            self.handles.append(placement.post())
            return
        buffer = self.buffers[i % len(self.buffers)]
        if (before := self.last.get(i % len(self.buffers))) is not None:
            before.order_after_sent(stream)
        at = buffer.address
        for part in parts:
            device.copy(at, part.ctypes.data, part.nbytes, stream)
            at += part.nbytes
        handle = exchange.post(GpuArray(buffer.address, (sum(counts),), np.dtype(np.int32)), counts, stream=stream)
        self.last[i % len(self.buffers)] = handle
        self.handles.append(handle)

    def complete(self) -> None:
        handle, stream = self.handles.popleft(), self.consuming.address
        received = handle.wait(stream=stream)
        for _ in range(self.idles):  # each is delayed
            self.device.fill(self.buffers[0].address + self.exchange.world_size * WINDOW, 0, 1, stream)
        self.results.append([pinned(self.device, 4 * count, np.int32) for count in received.counts()])
        for view, into in zip(received, self.results[-1], strict=True):
            interface = view.__cuda_array_interface__
            assert interface["shape"] == into.shape and interface["typestr"] == "<i4"
            self.device.copy(into.ctypes.data, view.address, into.nbytes, stream)
        handle.release(stream)


def _exact(rank, world, store, lag, paths, iterations, placed, device, idles=0):
    start()
    path = paths[rank % len(paths)]
    ordinal = rank % device
    with GpuExchange(store, rank, world, device=ordinal, lag=lag, window_bytes=WINDOW, gpu_path=path) as exchange:
        Loop(exchange, iterations, placed, idles if rank == 0 else 0).run()
        return [peer["path"] for peer in exchange.stats()["peers"]], exchange.stats()["max_lead"]


PATHS = {
    "ipc": (2, ["ipc"], {}),
    "auto": (3, ["auto"], {}),
    "staged": (2, ["staged"], {}),
    "mixed": (3, ["staged", "auto", "auto"], {}),  # rank 0 neither writes others' memory nor lets its own be written
    "puts": (3, ["staged"], {"BLSRDMA_DIRECT": "0"}),  # by UCX's puts, out of page-locked buffers
}
USUAL = {
    "ipc-0-posted", "ipc-0-placed", "ipc-3-posted", "ipc-3-placed", "auto-1-placed", "staged-0-placed",
    "staged-3-posted", "mixed-1-posted", "mixed-1-placed", "puts-0-posted", "puts-3-placed",
}  # fmt: skip


def _cases():
    for kind, lag, placed in itertools.product(PATHS, (0, 1, 3), (False, True)):
        name = f"{kind}-{lag}-{'placed' if placed else 'posted'}"
        yield pytest.param(kind, lag, placed, id=name, marks=() if name in USUAL else pytest.mark.slow)


@pytest.mark.parametrize(("kind", "lag", "placed"), list(_cases()))
def test_exact(where, kind, lag, placed):
    ranks, paths, env = PATHS[kind]
    env = {"SIMULATED_CUDA_DELAY_US": "150", "SIMULATED_CUDA_SEED": str(lag), **env, **where}
    results = run_ranks(_exact, ranks, lag, paths, 40, placed, 1, env=env)
    for result in results:
        ways, lead = result.value
        expected = [
            "self"
            if q == result.rank
            else "staged"
            if "staged" in (paths[q % len(paths)], paths[result.rank % len(paths)])
            else "ipc"
            for q in range(ranks)
        ]
        assert ways == expected
        assert lead <= lag


@pytest.mark.parametrize("path", ["ipc", "staged"])
@pytest.mark.parametrize("placed", [False, True], ids=["posted", "placed"])
def test_a_slow_consumer(where, path, placed):
    """Rank 0's device falls behind its host by more than there are windows: its peer's must wait, not write them."""
    run_ranks(_exact, 2, 1, [path], 30, placed, 1, 12, env={"SIMULATED_CUDA_DELAY_US": "400", **where})


def test_devices_that_cannot_reach_one_another():
    env = {"SIMULATED_CUDA_DEVICES": "2", "SIMULATED_CUDA_PEERS": "0"}
    for result in run_ranks(_exact, 2, 1, ["auto"], 10, False, 2, env=env):
        assert "staged" in result.value[0]


def _elsewhere(rank, world, store):
    """The caller works with device 0, and its exchange, lookups and kernels with device 1."""
    start()
    cu.enter(0)
    found, free = cu.current(), open_device(0).free_bytes
    pooler = native.cuda.GpuPooler(
        open_device(1), compiler.compiled(tables.SOURCE, {}, (9, 0)).image, 4096, 4096, 8, 20 * 10**9
    )
    with GpuExchange(store, rank, world, device=1, lag=1, window_bytes=WINDOW) as exchange:
        Loop(exchange, 6, True).run()
    assert open_device(0).free_bytes == free  # nothing of them was taken there
    assert pooler.close(20 * 10**9)
    assert cu.current() == found  # as torch's current device is that of the current context
    assert simulated.complaints() == 0


def test_the_current_device_stays_what_it_was():
    run_ranks(_elsewhere, 2, env={"SIMULATED_CUDA_DEVICES": "2"})


def test_devices_that_can():
    for result in run_ranks(_exact, 2, 1, ["auto"], 10, False, 2, env={"SIMULATED_CUDA_DEVICES": "2"}):
        assert "ipc" in result.value[0]


def test_alone(where):
    (result,) = run_ranks(_exact, 1, 2, ["auto"], 10, False, 1, env=where)
    assert result.value == (["self"], 0)


def _traced(rank, world, store, folder):
    start()
    with GpuExchange(store, rank, world, device=0, lag=1, window_bytes=WINDOW, trace=folder) as exchange:
        Loop(exchange, 8, True).run()


def test_a_trace_of_it(tmp_path):
    run_ranks(_traced, 2, str(tmp_path))
    for each in load(tmp_path)["gpu-exchange"]:
        for kind in ("begin", "post", "wait"):
            assert each.of(kind)[:, 1].tolist() == list(range(8))


def _sent(rank, world, store):
    start()
    device = open_device(0)
    with GpuExchange(store, rank, world, device=0, window_bytes=64) as exchange:
        send = vector(device, np.arange(4, dtype=np.int64))
        exchange.begin()
        handle = exchange.post(send, [2, 2], stream=0)
        handle.wait(stream=0)
        assert not handle.sent()  # its message to itself is a view of it
        handle.release(0)
        end = time.monotonic() + 10
        while not handle.sent() and time.monotonic() < end:
            pass
        assert handle.sent()
        with pytest.raises(WindowHeld):
            handle.wait()


def _reused(rank, world, store):
    start()
    device = open_device(0)
    values, zeros, got = (pinned(device, 4 * 300, np.int32) for _ in range(3))
    memory, writing, reading = device.memory(values.nbytes), device.stream(), device.stream()
    send = GpuArray(memory.address, values.shape, values.dtype)
    with GpuExchange(store, rank, world, device=0, window_bytes=WINDOW) as exchange:
        for i in range(30):
            values[:] = np.arange(300) + 1000 * i + 7 * rank
            device.copy(memory.address, values.ctypes.data, values.nbytes, writing.address)
            handle = exchange.post(send, [300, 0] if rank else [0, 300], stream=writing)
            handle.order_after_sent(writing)
            device.copy(memory.address, zeros.ctypes.data, zeros.nbytes, writing.address)
            received = handle.wait(stream=reading)
            device.copy(got.ctypes.data, received.addresses[1 - rank], got.nbytes, reading.address)
            handle.release(reading)
            assert device.synchronize(reading.address, 10**10)
            np.testing.assert_array_equal(got, np.arange(300) + 1000 * i + 7 * (1 - rank))
        assert device.synchronize(writing.address, 10**10)


def test_what_was_sent_may_be_overwritten_by_the_device(where):
    run_ranks(_reused, 2, env={"SIMULATED_CUDA_DELAY_US": "300", **where})


def test_sent(where):
    run_ranks(_sent, 2, env=where)
