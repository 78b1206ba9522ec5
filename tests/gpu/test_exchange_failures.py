"""GpuExchange on the simulated driver: what is refused, and what becomes of devices and ranks that fail."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

from blsrdma import GpuExchange
from blsrdma.errors import (
    CountsError,
    DtypeMismatch,
    ExchangeClosed,
    GpuError,
    MemoryLimitExceeded,
    MessageTooLarge,
    PeerFailed,
    PeerLeft,
    PeerTimeout,
    RendezvousError,
    SendBufferError,
    SettingsError,
    SettingsMismatch,
    WindowHeld,
)
from blsrdma.gpu.device import open_device
from blsrdma.ucx import native
from tests.gpu import simulated
from tests.gpu.memory import vector
from tests.gpu.rank import start
from tests.ranks import run_ranks


def _refusals(rank, world, store):
    start()
    device = open_device(0)
    with GpuExchange(store, rank, world, device=0, window_bytes=64) as exchange:
        send = vector(device, np.arange(40, dtype=np.int32))
        with pytest.raises(SendBufferError, match="blsrdma.Exchange sends from CPU memory"):
            exchange.post(np.arange(4), [2, 2])
        strided = type("Strided", (), {"__cuda_array_interface__": send.__cuda_array_interface__ | {"strides": (8,)}})()
        with pytest.raises(SendBufferError, match="C-contiguous"):
            exchange.post(strided, [20, 20])
        with pytest.raises(CountsError, match=r"\[10, 10\] do not add up to send.shape\[0\] = 40"):
            exchange.post(send, [10, 10])
        with pytest.raises(CountsError):
            exchange.post(send, [-1, 41])
        other = 1 - rank
        counts = [40 if q == other else 0 for q in range(2)]
        with pytest.raises(MessageTooLarge, match=f"for rank {other} has 160 bytes, a window of GPU memory 64") as info:
            exchange.post(send, counts)
        assert (info.value.rank, info.value.bytes, info.value.window_bytes) == (other, 160, 64)
        with pytest.raises(MessageTooLarge):
            exchange.place(counts, dtype=np.int32)
        handle = exchange.post(send, [40, 0] if rank == 0 else [0, 40])  # one's own has no window
        with pytest.raises(WindowHeld):
            exchange.post(send, [16, 24] if rank else [24, 16])
        handle.wait()
        handle.release()
        placement = exchange.place([1, 1])
        with pytest.raises(WindowHeld, match="placed and not been posted"):
            exchange.place([1, 1])
        with pytest.raises(WindowHeld, match="placed and not been posted"):
            exchange.post(send, [20, 20])
        with placement.post() as received:
            assert received.counts() == [1, 1]
            with pytest.raises(IndexError):
                received[2]
        with pytest.raises(WindowHeld):
            placement.post()
    with pytest.raises(ExchangeClosed):
        exchange.post(send, [20, 20])


def test_refusals(where):
    run_ranks(_refusals, 2, env=where)


def _start(rank, world, store, settings):
    start()
    kind, text = SettingsError, ""
    try:
        GpuExchange(store, rank, world, **settings[rank]).close()
    except Exception as error:
        kind, text = type(error), str(error)
    return kind, text


def test_bad_starts():
    def starts(*settings, env=None):
        return [result.value for result in run_ranks(_start, 2, settings, env=env)]

    base = {"device": 0, "timeout": 20.0}
    for kind, text in starts(base | {"lag": 1}, base):
        assert kind is SettingsMismatch and "lag is 1 on rank 0; 0 on rank 1" in text
    good, bad = starts(base, base | {"device": 3})
    assert bad == (GpuError, "GPU 3: this process sees 1")
    assert good[0] is RendezvousError and "GPU 3: this process sees 1" in good[1]
    good, bad = starts(base, base | {"gpu_path": "ether"})
    assert bad[0] is SettingsError and "auto, ipc, staged" in bad[1]
    assert good[0] is RendezvousError
    first, second = starts(base | {"gpu_path": "ipc"}, base | {"gpu_path": "staged"})
    assert first[0] is GpuError and "rank 1's GPU memory cannot be written: it does not offer" in first[1]
    assert second[0] is RendezvousError and "does not offer" in second[1]
    for kind, text in starts(
        base | {"window_bytes": 1 << 30}, base | {"window_bytes": 1 << 30}, env={"SIMULATED_CUDA_MEMORY": str(1 << 30)}
    ):
        assert kind is MemoryLimitExceeded and "4.0 GiB of GPU 0" in text
    for kind, text in starts(base, base, env={"BLSRDMA_CHECKSUM": "1"}):
        assert kind is SettingsError and "checksum: not of messages in GPU memory" in text


def _types_differ(rank, world, store):
    start()
    device = open_device(0)
    values = np.arange(4, dtype=np.int32 if rank else np.float32)
    with GpuExchange(store, rank, world, device=0) as exchange:
        send = vector(device, values)
        handle = exchange.post(send, [2, 2])
        with pytest.raises(DtypeMismatch):
            handle.wait()


def test_types_differ(where):
    run_ranks(_types_differ, 2, env=where)


def _after_a_round(rank, world, store):
    """An exchange, and what it sends. Everyone has everyone's first message: what a rank does to itself afterwards
    does not touch these."""
    start()
    exchange = GpuExchange(store, rank, world, device=0, close_timeout=1.0)
    send = vector(open_device(0), np.arange(world, dtype=np.int32))
    with exchange.post(send, [1] * world):
        pass
    store.set(f"first/{rank}", "")
    store.wait([f"first/{q}" for q in range(world)])
    return exchange, send


def _held(rank, world, store):
    """Rank 1's device stops: the others time out and say so, and everyone's close() keeps to its limit."""
    exchange, send = _after_a_round(rank, world, store)
    if rank == 1:
        simulated.control().simulated_hold(1)  # for good
    handle = exchange.post(send, [1] * world)
    if rank != 1:
        with pytest.raises(PeerTimeout, match="missing: rank 1"):
            handle.wait(0.5)
    store.set(f"tried/{rank}", "")
    store.wait([f"tried/{q}" for q in range(world)])
    began = time.monotonic()
    exchange.close()
    assert time.monotonic() - began < 4
    if rank == 1:
        os._exit(0)  # what the held device still has is kept


def test_a_device_that_hangs():
    run_ranks(_held, 3, expect_exit={1: 0})


def _fails(rank, world, store):
    exchange, send = _after_a_round(rank, world, store)
    if rank == 0:
        simulated.fail("cuMemcpyAsync", 700, 0)  # an illegal address somewhere: the context is lost
        with pytest.raises(GpuError) as info:
            exchange.post(send, [1] * world)
        assert info.value.result == 700
        with pytest.raises(GpuError):
            exchange.begin()
        exchange.close(info.value)
    else:
        handle = exchange.post(send, [1] * world)
        with pytest.raises(PeerFailed, match="rank 0 failed: GpuError"):
            handle.wait(20)
        exchange.close()


def test_a_device_that_fails():
    run_ranks(_fails, 3)


def _killed(rank, world, store):
    exchange, send = _after_a_round(rank, world, store)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    handle = exchange.post(send, [1] * world)
    with pytest.raises(PeerFailed, match="rank 1 died"):
        handle.wait(20)
    exchange.close()


def test_a_rank_that_is_killed(where):
    run_ranks(_killed, 3, expect_exit={1: -signal.SIGKILL}, env=where)


def _leaves(rank, world, store):
    start()
    device = open_device(0)
    exchange = GpuExchange(store, rank, world, device=0, lag=1)
    send = vector(device, np.arange(world, dtype=np.int32))
    handles = [exchange.post(send, [1] * world)]
    if rank == 0:
        exchange.close()
        return
    with handles[0] as received:  # what was posted before arrives
        assert len(received) == world
    handle = exchange.post(send, [1] * world)
    with pytest.raises(PeerLeft):
        handle.wait(20)
    exchange.close()


def test_a_rank_that_leaves(where):
    run_ranks(_leaves, 2, env=where)


def _without(rank, world, store):
    with pytest.raises(GpuError, match="there is no CUDA driver here: .*no-such-driver.so"):
        native.cuda.load("no-such-driver.so")
    start()  # a later try may succeed
    assert open_device(0).capability >= (8, 0)


def test_without_a_driver():
    run_ranks(_without, 1)
