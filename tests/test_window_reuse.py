"""When a window is used again: by a script that breaks the rule, and at random with guards around every window."""

from __future__ import annotations

import time
from collections import deque

import numpy as np
import pytest

from blsrdma import Exchange
from blsrdma.errors import WindowCorrupt
from blsrdma.windows import HEADER_BYTES, LEAST_PAYLOAD, windows_needed
from tests.patterns import TRANSPORTS, message, messages
from tests.ranks import run_ranks

SIZE = 512


def _schedule(rank, world, store, lag, windows):
    """Rank 1 holds the message of iteration 0 while rank 0 runs as far ahead as the rules let it: what does rank 1 see?

    Rank 1 posts 0 .. lag and pauses there, holding iteration 0 and all later ones unreleased (post lag + 1 would need
    its release). Rank 0 holds rank 1's counters up to lag, so it completes and releases 0 .. lag and posts up to 2 lag
    + 1, the furthest that any schedule can get. That message belongs into window (2 lag + 1) % windows.
    """
    with Exchange(store, rank, world, lag=lag, window_bytes=SIZE, timeout=20, _windows=windows) as exchange:

        def post(i):
            return exchange.post(messages(rank, i, [SIZE] * world), [SIZE] * world)

        if rank == 0:
            handles = deque(post(i) for i in range(lag + 1))
            store.get("holding")
            for i in range(lag + 1, 2 * lag + 2):
                with handles.popleft():
                    pass
                handles.append(post(i))
            store.set("far ahead", "1")
            store.get("looked")
        else:
            handles = deque(post(i) for i in range(lag + 1))
            first = handles[0].wait()
            assert bytes(first[0]) == bytes(message(0, 1, 0, SIZE))
            store.set("holding", "1")
            store.get("far ahead")
            time.sleep(0.2)  # a put may still be under way
            intact = bytes(first[0]) == bytes(message(0, 1, 0, SIZE))
            store.set("looked", "1")
            return intact
        return None


@pytest.mark.parametrize("transport", ["default", "posix-puts", "tcp"])
@pytest.mark.parametrize("lag", [0, 1, 3])
def test_the_rule_is_exact(lag: int, transport: str) -> None:
    """One window fewer than the rule asks for overwrites a live one in every run of this schedule; the rule never
    does."""
    for _ in range(3):
        enough = run_ranks(_schedule, 2, lag, windows_needed(lag), env=TRANSPORTS[transport])
        assert enough[1].value is True
        one_fewer = run_ranks(_schedule, 2, lag, windows_needed(lag) - 1, env=TRANSPORTS[transport])
        assert one_fewer[1].value is False


def _random(rank, world, store, lag, iterations, seed, window):
    rng = np.random.default_rng((seed, rank))
    schedule = np.random.default_rng(seed)  # the same on every rank
    guard = 128
    with Exchange(store, rank, world, lag=lag, window_bytes=window, timeout=60, _guard_bytes=guard) as exchange:
        geometry, memory = exchange.geometry, exchange._bytes
        canary = rng.integers(1, 256, guard, dtype=np.uint8)
        places = []
        for source in range(world):
            for w in range(geometry.windows if source != rank else 0):
                start = geometry.window(rank, source, w)
                end = start + HEADER_BYTES + max(LEAST_PAYLOAD, -(-window // 64) * 64)
                places += [slice(start - guard, start), slice(end, end + guard)]
        for place in places:
            memory[place] = canary
        handles = deque()

        def finish():
            handle, views = handles.popleft(), None
            with handle as received:
                views = list(received)
                for q in range(world):
                    expected = message(q, rank, handle.iteration, len(views[q]))
                    np.testing.assert_array_equal(views[q], expected, err_msg=f"from {q} in {handle.iteration}")
                if rng.random() < 0.02:
                    time.sleep(rng.exponential(0.002))
                    for q in range(world):  # still the same at the end of its life
                        np.testing.assert_array_equal(views[q], message(q, rank, handle.iteration, len(views[q])))
            return [len(view) for view in views]

        total = 0
        for i in range(iterations):
            exchange.begin()
            if len(handles) > lag:
                total += sum(finish())
            if schedule.random() < 0.02 and schedule.integers(world) == rank:
                time.sleep(rng.exponential(0.003))
            sizes = [int(rng.choice([0, 1, 64, window, int(rng.integers(window + 1))])) for _ in range(world)]
            handles.append(exchange.post(messages(rank, i, sizes), sizes))
            while handles and rng.random() < 0.3 and handles[0].ready():
                total += sum(finish())
        while handles:
            total += sum(finish())
        assert all((memory[place] == canary).all() for place in places), "something wrote outside the windows"
        stats = exchange.stats()
        assert stats["max_lead"] <= lag
        return total, sum(peer["bytes"] for peer in stats["peers"])


@pytest.mark.parametrize(
    ("ranks", "lag", "transport"),
    [(2, 0, "default"), (3, 1, "tcp"), (4, 2, "default"), (3, 3, "cma-puts"), (2, 5, "posix-puts"), (4, 4, "sysv")],
)
def test_random_messages(ranks: int, lag: int, transport: str, no_leftovers: None) -> None:
    results = run_ranks(_random, ranks, lag, 500, 1000 * ranks + lag, 3000, env=TRANSPORTS[transport])
    assert sum(result.value[0] for result in results) == sum(result.value[1] for result in results) > 0


def _scribbled_header(rank, world, store, word, value):
    """Rank 1 tampers with the header that rank 0 wrote for it, as a stray write would."""
    with Exchange(store, rank, world, window_bytes=SIZE, timeout=20) as exchange:
        handle = exchange.post(messages(rank, 0, [SIZE] * world), [SIZE] * world)
        if rank == 1:
            while not handle.ready():
                time.sleep(0.001)
            start = exchange.geometry.window(1, 0, 0)
            exchange._bytes[start : start + 64].view(np.uint64)[word] = value
            with pytest.raises(WindowCorrupt, match="iteration 0: rank 0: its header does not match its check word"):
                handle.wait()


@pytest.mark.parametrize(("word", "value"), [(0, 7), (1, 2**63), (2, 1), (3, 1), (4, 9), (5, 0)])
def test_a_lying_header_is_told(word: int, value: int) -> None:
    run_ranks(_scribbled_header, 2, word, value)
