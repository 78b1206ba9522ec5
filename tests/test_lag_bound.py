"""The bound is real, and the bytes move by themselves."""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import pytest

from blsrdma import Exchange
from tests.patterns import TRANSPORTS, message, messages
from tests.ranks import run_ranks


def _one_sleeps(rank, world, store, lag, sleeper, asleep_at, iterations):
    """Returns when each iteration began here, when the sleeper slept, and the lead seen. Times are of one host's
    clock."""
    began, slept = [], None
    with Exchange(store, rank, world, lag=lag, window_bytes=64) as exchange:
        handles = deque()
        for i in range(iterations):
            exchange.begin()
            began.append(time.monotonic())
            if len(handles) > lag:
                with handles.popleft():
                    pass
            if rank == sleeper and i == asleep_at:
                start = time.monotonic()
                time.sleep(0.3)
                slept = (start, time.monotonic())
            handles.append(exchange.post(np.full(world, i, np.int32)))
        while handles:
            with handles.popleft():
                pass
        return began, slept, exchange.stats()["max_lead"]


@pytest.mark.parametrize("transport", ["default", "tcp"])
@pytest.mark.parametrize("lag", [0, 1, 2, 3, 5])
def test_exactly_lag_iterations_begin_while_one_sleeps(lag: int, transport: str) -> None:
    rng = np.random.default_rng(lag)
    sleeper, asleep_at = int(rng.integers(3)), int(rng.integers(3, 12))
    results = run_ranks(_one_sleeps, 3, lag, sleeper, asleep_at, 20, env=TRANSPORTS[transport])
    _, (start, end), _ = results[sleeper].value
    for result in results:
        began, _, max_lead = result.value
        if result.rank == sleeper:
            assert max_lead <= lag
            continue
        # Its own asleep_at, the next `lag`, and no more.
        assert began[asleep_at + lag] < end - 0.1
        assert began[asleep_at + lag + 1] >= end
        assert max_lead == lag
        assert start < end


def _post_and_sleep(rank, world, store, sleeps):
    """Rank 0 posts at lag 2. Whoever is named in `sleeps` sleeps then; the others say how long the iteration took
    them."""
    with Exchange(store, rank, world, lag=2, window_bytes=1 << 17) as exchange:
        for i in range(3):  # all ranks are connected and awake
            with exchange.post(messages(rank, i, [100_000] * world), [100_000] * world):
                pass
        exchange.begin()
        handle = exchange.post(messages(rank, 3, [100_000] * world), [100_000] * world)
        posted = time.monotonic()
        if rank in sleeps:
            time.sleep(1.0)
            took = None
        else:
            handle.wait()
            took = time.monotonic() - posted
        with handle as received:
            for q in range(world):
                np.testing.assert_array_equal(received[q], message(q, rank, 3, 100_000))
        return posted, took


@pytest.mark.parametrize("sleeps", [(0,), (1, 2)], ids=["sender", "receivers"])
@pytest.mark.parametrize("transport", ["tcp", "cma-puts", "posix-puts", "default"])
def test_bytes_move_while_their_poster_or_receiver_sleeps(transport: str, sleeps: tuple[int, ...]) -> None:
    results = run_ranks(_post_and_sleep, 3, sleeps, env=TRANSPORTS[transport])
    last_post = max(result.value[0] for result in results)
    for result in results:
        posted, took = result.value
        if took is not None:
            assert posted + took - last_post < 0.05, f"rank {result.rank} waited for a sleeper"


def _receiver_sleeps_before_it_looks(rank, world, store):
    """Rank 1 makes no call while rank 0's message is under way; it must be here when rank 1 looks."""
    with Exchange(store, rank, world, lag=2, window_bytes=1 << 17) as exchange:
        for i in range(3):
            with exchange.post(messages(rank, i, [100_000] * world), [100_000] * world):
                pass
        if rank == 1:
            handle = exchange.post(np.zeros(world, np.uint8))
            store.set("posted", "1")
            time.sleep(0.5)
            assert handle.ready()  # at the first look, with no wait before
        else:
            store.get("posted")
            handle = exchange.post(messages(rank, 3, [100_000, 100_000]), [100_000, 100_000])
        with handle as received:
            assert bytes(received[0][:100_000]) == bytes(message(0, rank, 3, 100_000))


@pytest.mark.parametrize("transport", ["tcp", "cma-puts"])
def test_a_sleeping_receiver_finds_the_message(transport: str) -> None:
    run_ranks(_receiver_sleeps_before_it_looks, 2, env=TRANSPORTS[transport])
