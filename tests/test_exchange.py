"""The exchange as its users see it: what arrives, when handles say what, and what is refused."""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import pytest
import torch

from blsrdma import Exchange
from blsrdma.errors import (
    CountsError,
    DtypeMismatch,
    ExchangeClosed,
    PeerFailed,
    PeerLeft,
    PeerTimeout,
    SendBufferError,
    WindowHeld,
)
from tests.patterns import TRANSPORTS, message, messages
from tests.ranks import run_ranks


def nothing_is_quarantined() -> bool:
    from blsrdma import exchange

    return not exchange._quarantine


def wait_for(condition, seconds: float = 10.0) -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "condition not met in time"
        time.sleep(0.001)


# --- values


def _every_transport(rank, world, store, lag, expected_path):
    """Irregular messages, empty ones too, overwritten by their sender as soon as sent() allows."""
    rng = np.random.default_rng(rank)
    with Exchange(store, rank, world, lag=lag, window_bytes=20_000) as exchange:
        handles, buffers = deque(), deque()

        def finish():
            handle = handles.popleft()
            with handle as received:
                for q in range(world):
                    np.testing.assert_array_equal(received[q], message(q, rank, handle.iteration, len(received[q])))

        for i in range(150):
            assert exchange.begin() == i
            if len(handles) > lag:
                finish()
            sizes = [int(rng.choice([0, 1, 63, 64, 4097, int(rng.integers(20_001))])) for _ in range(world)]
            send = messages(rank, i, sizes)
            handles.append(exchange.post(send, sizes))
            buffers.append((handles[-1], send))
            while buffers and buffers[0][0].sent():
                buffers.popleft()[1][:] = 0xEE  # nothing of it may reach anybody
        while handles:
            finish()
        wait_for(lambda: all(handle.sent() for handle, _ in buffers))
        stats = exchange.stats()
        assert stats["max_lead"] <= lag
        paths = {peer["path"] for peer in stats["peers"] if peer["rank"] != rank}
        assert paths == {expected_path}, stats
    assert nothing_is_quarantined()
    return [peer["transport"] for peer in stats["peers"]]


@pytest.mark.parametrize("lag", [0, 2])
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_transport(transport: str, lag: int, no_leftovers: None) -> None:
    path = "put" if transport.endswith("-puts") or transport == "tcp" else "direct"
    results = run_ranks(_every_transport, 3, lag, path, env=TRANSPORTS[transport])
    if path == "put":
        named = {"tcp": "tcp", "posix-puts": "posix", "sysv-puts": "sysv", "cma-puts": "cma"}.get(transport, "")
        assert named in results[0].value[1]


def _dtypes(rank, world, store):
    with Exchange(store, rank, world, window_bytes=1 << 16) as exchange:
        for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64):
            send = torch.arange(2 * world * 3).reshape(2 * world, 3).to(dtype) + rank
            with exchange.post(send) as received:
                for q in range(world):
                    whole = torch.arange(2 * world * 3).reshape(2 * world, 3).to(dtype) + q
                    assert received[q].dtype == whole.dtype
                    assert torch.equal(received[q], whole[2 * rank : 2 * rank + 2])
        counts = [rank + q for q in range(world)]
        send = np.full((sum(counts), 2, 2), rank, np.float16)
        with exchange.post(send, counts) as received:
            assert received.counts() == [rank + q for q in range(world)]
            for q in range(world):
                assert received[q].shape == (rank + q, 2, 2)
                assert (received[q] == q).all()
            assert len(received) == world
            assert [len(each) for each in received] == received.counts()
            assert [len(each) for each in received[-2:]] == received.counts()[-2:]
        with torch.inference_mode(), exchange.post(torch.ones(world)) as received:
            assert sum(each.sum().item() for each in received) == world
    assert nothing_is_quarantined()


def test_dtypes_shapes_and_libraries() -> None:
    run_ranks(_dtypes, 3)


def _alone(rank, world, store, copy_self):
    with Exchange(store, rank, world, lag=1, window_bytes=100, copy_self=copy_self) as exchange:
        for i in range(5):
            exchange.begin()
            send = np.full(100, i, np.uint8)
            handle = exchange.post(send)
            assert handle.ready()
            with handle as received:
                assert np.shares_memory(received[0], send) is not copy_self
                assert handle.sent() is copy_self
                assert (received[0] == i).all()
            assert handle.sent()


@pytest.mark.parametrize("copy_self", [False, True])
def test_one_rank(copy_self: bool) -> None:
    run_ranks(_alone, 1, copy_self)


def _views_outlive_the_exchange(rank, world, store):
    with Exchange(store, rank, world, window_bytes=1 << 16) as exchange, exchange.post(np.arange(world)) as received:
        views = list(received)
    del exchange, received
    assert [int(view.sum()) for view in views] == [rank] * world  # old memory perhaps, freed memory never


def test_views_outlive_the_exchange() -> None:
    run_ranks(_views_outlive_the_exchange, 2)


def _several(rank, world, store):
    """Exchanges of one process share UCX and do not mix."""
    first = Exchange(store, rank, world, name="first", lag=2, window_bytes=64)
    second = Exchange(store, rank, world, name="second", window_bytes=64)
    for i in range(20):
        a = first.post(np.full(world, i, np.int32))
        b = second.post(np.full(world, -i, np.int32))
        with b as received:
            assert all((each == -i).all() for each in received)
        with a as received:
            assert all((each == i).all() for each in received)
    first.close()
    again = Exchange(store, rank, world, name="first", window_bytes=64)  # the same name, once it is free
    with again.post(np.full(world, 7)) as received:
        assert all((each == 7).all() for each in received)
    again.close()
    second.close()
    second.close()
    assert nothing_is_quarantined()


@pytest.mark.parametrize("transport", ["default", "tcp"])
def test_several_exchanges_in_one_process(transport: str, no_leftovers: None) -> None:
    run_ranks(_several, 2, env=TRANSPORTS[transport])


# --- refusals: nothing is lost, nobody hangs, the exchange goes on


def _refusals(rank, world, store):
    with Exchange(store, rank, world, lag=1, window_bytes=100) as exchange:
        small = np.zeros(10, np.uint8)
        with pytest.raises(CountsError, match="counts add up to 9 items, send has 10"):
            exchange.post(small, [4, 5])
        with pytest.raises(CountsError, match=r"counts\[1\] = -1"):
            exchange.post(small, [11, -1])
        with pytest.raises(CountsError):
            exchange.post(small, [2**62, 2**62])
        with pytest.raises(CountsError, match="one entry per rank"):
            exchange.post(small, [10])
        with pytest.raises(SendBufferError, match="not contiguous"):
            exchange.post(torch.zeros(4, 4).t())
        # A message to oneself is a view and needs no window.
        big = [0, 0]
        big[rank] = 1000
        held = [exchange.post(np.zeros(1000, np.uint8), big)]
        held.append(exchange.post(small))
        started = time.monotonic()
        with pytest.raises(WindowHeld, match="iteration 2 cannot be posted while this rank still holds iteration 0"):
            exchange.post(small)
        assert time.monotonic() - started < 1.0
        assert exchange.iteration == 2
        for handle in held:
            handle.wait()
            handle.release()
            handle.release()
            with pytest.raises(WindowHeld, match="released"):
                handle.wait()
        received = exchange.post(small).wait()
        assert [len(each) for each in received] == [5, 5]
    with pytest.raises(ExchangeClosed):
        exchange.post(small)
    with pytest.raises(ExchangeClosed):
        exchange.begin()


def test_refusals_lose_nothing() -> None:
    run_ranks(_refusals, 2)


LATE = r"not complete at the deadline on rank 0; missing: rank 1 \(alive; 0 of its messages are here, 0 bytes"


def _timeout(rank, world, store):
    with Exchange(store, rank, world, timeout=5) as exchange:
        if rank == 0:
            handle = exchange.post(np.zeros(world))
            assert not handle.ready()
            started = time.monotonic()
            with pytest.raises(PeerTimeout, match=LATE) as caught:
                handle.wait(timeout=0.2)
            assert 0.19 < time.monotonic() - started < 2
            assert (caught.value.iteration, caught.value.missing, caught.value.counters) == (0, (1,), {1: 0})
            store.set("late", "now")
            with handle as received:  # nothing was lost
                assert len(received) == 2
        else:
            store.get("late")
            with exchange.post(np.zeros(world)):
                pass


def test_a_deadline_names_who_is_missing_and_loses_nothing() -> None:
    run_ranks(_timeout, 2)


def _different_types(rank, world, store):
    with Exchange(store, rank, world) as exchange:
        exchange.post(np.zeros(world, np.float32 if rank == 0 else np.int32)).wait()


def test_peers_that_post_different_types() -> None:
    results = run_ranks(_different_types, 2, check=False)
    for result, (mine, other) in zip(results, [("f4", "i4"), ("i4", "f4")], strict=True):
        assert isinstance(result.error.exception, DtypeMismatch)
        assert f"posted elements of type {other}, this rank of type {mine}" in result.error.message


# --- the others learn of it


def _one_errs(rank, world, store):
    with Exchange(store, rank, world, window_bytes=64, timeout=30) as exchange:
        for i in range(10):
            if rank == 1 and i == 5:
                exchange.post(np.zeros(world * 65, np.uint8), [-1] * world)
            with exchange.post(np.zeros(world, np.uint8)):
                pass


@pytest.mark.parametrize("transport", ["default", "default-puts", "tcp"])
def test_an_error_on_one_rank_ends_all_and_names_it(transport: str, no_leftovers: None) -> None:
    started = time.monotonic()
    results = run_ranks(_one_errs, 3, env=TRANSPORTS[transport], check=False)
    assert time.monotonic() - started < 15
    assert isinstance(results[1].error.exception, CountsError)
    for result in (results[0], results[2]):
        failure = result.error.exception
        assert isinstance(failure, PeerFailed)
        assert (failure.rank, failure.iteration) == (1, 5)
        assert "rank 1 failed: CountsError: counts[0] = -1: must be >= 0" in str(failure)


def _one_leaves(rank, world, store):
    exchange = Exchange(store, rank, world, timeout=30)
    for _ in range(3 if rank == 1 else 5):
        with exchange.post(np.zeros(world, np.uint8)):
            pass
    exchange.close()


@pytest.mark.parametrize("transport", ["default", "tcp"])
def test_a_rank_that_leaves_early(transport: str) -> None:
    results = run_ranks(_one_leaves, 2, env=TRANSPORTS[transport], check=False)
    assert results[1].error is None
    assert isinstance(results[0].error.exception, PeerLeft)
    assert "iteration 3: rank 1 left before it posted it" in results[0].error.message


def _one_dies(rank, world, store):
    import os
    import signal

    with Exchange(store, rank, world, timeout=30) as exchange:
        for i in range(10):
            if rank == 1 and i == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            with exchange.post(np.zeros(world, np.uint8)):
                pass


@pytest.mark.parametrize("transport", ["default", "cma-puts", "tcp"])
def test_a_rank_that_dies(transport: str, no_leftovers: None) -> None:
    results = run_ranks(_one_dies, 3, env=TRANSPORTS[transport], check=False)
    for result in (results[0], results[2]):
        failure = result.error.exception
        assert isinstance(failure, PeerFailed), result
        assert failure.rank == 1
        assert failure.iteration in ((5,) if transport == "default" else (4, 5))  # a put in flight dies with its sender


def _failure_sticks(rank, world, store):
    exchange = Exchange(store, rank, world, timeout=30)
    handle = exchange.post(np.zeros(world, np.uint8))
    handle.wait()
    if rank == 1:
        exchange.close(ValueError("enough"))
        return
    handle.release()
    later = exchange.post(np.zeros(world, np.uint8))
    for call in (
        later.wait,
        later.wait,
        exchange.begin,
        exchange.stats,
        lambda: exchange.post(np.zeros(world, np.uint8)),
    ):
        with pytest.raises(PeerFailed, match="rank 1 failed: ValueError: enough"):
            call()
    exchange.close()


def test_after_a_failure_every_call_says_the_same() -> None:
    run_ranks(_failure_sticks, 2)
