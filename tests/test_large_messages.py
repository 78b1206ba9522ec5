"""Messages larger than their windows: pulled out of the sender's buffer by the receiver, when it waits.

On one host it reads the sender's memory; with direct stores off (-puts), as between hosts, UCX gets them.
"""

from __future__ import annotations

import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from blsrdma import Exchange
from blsrdma.errors import CountsError, MemoryLimitExceeded, SendBufferError, WindowHeld
from tests.patterns import TRANSPORTS, message, messages
from tests.ranks import run_ranks


def _any_size(rank, world, store, lag, window, with_out):
    rng = np.random.default_rng(rank)
    with Exchange(store, rank, world, lag=lag, window_bytes=window, checksum=lag == 1) as exchange:
        handles = []

        def finish():
            handle = handles.pop(0)
            if with_out:
                lengths = all_sizes[handle.iteration][:, rank]
                out = np.empty(lengths.sum(), np.uint8)
                received = handle.wait(out=out, counts=lengths)
                start = 0
                for q in range(world):
                    np.testing.assert_array_equal(out[start : start + lengths[q]], received[q])
                    start += lengths[q]
            else:
                received = handle.wait()
            for q in range(world):
                np.testing.assert_array_equal(received[q], message(q, rank, handle.iteration, len(received[q])))
            handle.release()

        schedule = np.random.default_rng(5)
        all_sizes = []
        sent = []
        for i in range(40):
            exchange.begin()
            if len(handles) > lag:
                finish()
            all_sizes.append(schedule.choice([0, 10, window, window + 1, 3 * window, 200_000], (world, world)))
            sizes = all_sizes[i][rank].tolist()
            send = messages(rank, i, sizes)
            handles.append(exchange.post(send, sizes))
            sent.append((handles[-1], send))
            while sent and sent[0][0].sent():
                sent.pop(0)[1][:] = 0xEE  # nothing of it may reach anybody
            if rng.random() < 0.1:
                time.sleep(0.002)
        while handles:
            finish()
        with exchange.post(np.zeros(world, np.uint8)):
            pass  # everybody has pulled
        deadline = time.monotonic() + 5
        while not all(handle.sent() for handle, _ in sent):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert exchange._large_bytes == 0


@pytest.mark.parametrize("with_out", [False, True], ids=["views", "out"])
@pytest.mark.parametrize("lag", [0, 1, 3])
@pytest.mark.parametrize("transport", ["default", "default-puts", "posix", "sysv-puts", "cma-puts", "tcp-puts"])
def test_any_size(transport: str, lag: int, with_out: bool, no_leftovers: None) -> None:
    run_ranks(_any_size, 3, lag, 1000, with_out, env=TRANSPORTS[transport])


def _both_directions(rank, world, store, size):
    """Everybody sends everybody a large message at once and nobody can deadlock."""
    with Exchange(store, rank, world, window_bytes=0) as exchange:
        send = torch.full((world, size), rank, dtype=torch.uint8)
        out = torch.empty(world * size, dtype=torch.uint8)
        for _ in range(3):
            started = time.monotonic()
            handle = exchange.post(send.view(-1))
            handle.wait(out=out)
            handle.release()
            took = time.monotonic() - started
        assert torch.equal(out.view(world, size), torch.arange(world, dtype=torch.uint8)[:, None].expand(world, size))
        return (world - 1) * size / took / 1e9


@pytest.mark.parametrize("transport", ["default", "posix-puts", "tcp-puts"])
def test_both_directions_at_once(transport: str) -> None:
    results = run_ranks(_both_directions, 3, 20 << 20, env=TRANSPORTS[transport])
    print(transport, [f"{result.value:.2f} GB/s" for result in results])


@pytest.mark.slow
def test_gigabytes() -> None:
    run_ranks(_both_directions, 2, 3 << 30, timeout=300)


def _ways(rank, world, store):
    with Exchange(store, rank, world, window_bytes=0) as exchange, exchange.post(messages(rank, 0, [9] * world)):
        return [peer["large"] for peer in exchange.stats()["peers"]]


@pytest.mark.parametrize("transport", ["default", "tcp", "default-puts", "tcp-puts"])
def test_stats_say_how_they_come(transport: str) -> None:
    capabilities = int(re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())[1], 16)
    permitted = capabilities >> 19 & 1  # CAP_SYS_PTRACE; without it the system may forbid it, and nothing is lost
    expected = {"get"} if transport.endswith("-puts") else {"read"} if permitted else {"read", "get"}
    for result in run_ranks(_ways, 2, env=TRANSPORTS[transport]):
        assert result.value[result.rank] == ""
        assert result.value[1 - result.rank] in expected


def _refusals(rank, world, store):
    with Exchange(store, rank, world, window_bytes=100, memory_limit=1 << 20, timeout=10) as exchange:
        send = np.full(world * (1 << 20), rank, np.uint8)
        handle = exchange.post(send)
        need = "messages larger than their windows need 1.0 MiB; with .* memory_limit = 1.0 MiB"
        with pytest.raises(MemoryLimitExceeded, match=need):
            handle.wait()
        with pytest.raises(CountsError, match="out has 5 bytes, the messages of iteration 0 2097152"):
            handle.wait(out=np.zeros(5, np.uint8))
        with pytest.raises(SendBufferError, match="out has elements of type f4, send u1"):
            handle.wait(out=np.zeros(len(send) // 4, np.float32))
        with pytest.raises(CountsError, match=rf"rank 0 sent 1.04858e\+06 items to rank {rank}, which expected 7"):
            handle.wait(counts=[7, 7])
        out = np.zeros_like(send)  # nothing was lost
        received = handle.wait(out=out)
        assert [int(each[-1]) for each in received] == [0, 1]
        handle.release()
        assert (out[: 1 << 20] == 0).all()
        assert (out[1 << 20 :] == 1).all()
        with pytest.raises(WindowHeld):
            handle.wait()


def test_refusals_lose_nothing() -> None:
    run_ranks(_refusals, 2)


def _not_wanted(rank, world, store):
    """A large message that its receiver releases without a look frees its sender all the same."""
    with Exchange(store, rank, world, lag=1, window_bytes=100, timeout=10) as exchange:
        handles = []
        for i in range(12):
            exchange.begin()
            handles.append(exchange.post(messages(rank, i, [5000] * world), [5000] * world))
            if i % 3 == 0:
                handles[i].wait()  # looked at, never pulled... unless it is
            handles[i].release()
        last = exchange.post(np.zeros(world, np.uint8))
        last.wait()
        last.release()
        deadline = time.monotonic() + 5
        while not all(handle.sent() for handle in handles[:-2]):
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.mark.parametrize("transport", ["default", "tcp-puts"])
def test_not_wanted(transport: str) -> None:
    run_ranks(_not_wanted, 2, env=TRANSPORTS[transport])


def _sent_waits_for_the_pull(rank, world, store):
    with Exchange(store, rank, world, window_bytes=100, timeout=10) as exchange:
        if rank == 0:
            handle = exchange.post(messages(0, 0, [0, 5000]), [0, 5000])
            handle.wait()
            time.sleep(0.2)
            assert not handle.sent()  # rank 1 has not pulled
            store.set("pull", "1")
            deadline = time.monotonic() + 5
            while not handle.sent():
                assert time.monotonic() < deadline
                time.sleep(0.001)
        else:
            handle = exchange.post(np.zeros(0, np.uint8), [0, 0])
            store.get("pull")
            with handle as received:
                np.testing.assert_array_equal(received[0], message(0, 1, 0, 5000))


@pytest.mark.parametrize("transport", ["default", "tcp-puts"])
def test_sent_waits_for_the_pull(transport: str) -> None:
    run_ranks(_sent_waits_for_the_pull, 2, env=TRANSPORTS[transport])


def _sent_before_wait(rank, world, store):
    """Everybody polls sent() before its own wait(): what is here is pulled meanwhile."""
    sizes = [0 if q == rank else 5000 for q in range(world)]
    with Exchange(store, rank, world, window_bytes=100, timeout=20) as exchange:
        for i in range(6):
            handle = exchange.post(messages(rank, i, sizes), sizes)
            deadline = time.monotonic() + 20
            while not handle.sent():
                assert time.monotonic() < deadline
            received = handle.wait(out=np.empty(5000 * (world - 1), np.uint8) if i % 2 else None)
            for q in range(world):
                np.testing.assert_array_equal(received[q], message(q, rank, i, 0 if q == rank else 5000))
            handle.release()
        assert exchange._large_bytes == 0


@pytest.mark.parametrize("transport", ["default", "tcp-puts"])
def test_sent_before_wait(transport: str) -> None:
    run_ranks(_sent_before_wait, 3, env=TRANSPORTS[transport])
