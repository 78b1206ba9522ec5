"""The exchange's list of faults, for lookups of both modes: who needs the failed rank is told, all others go on."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest

from blsrdma.errors import PeerFailed, PeerTimeout, WindowCorrupt
from blsrdma.lookup import Lookup
from tests.lookup.test_failures import bags, meet, stop, tables
from tests.patterns import TRANSPORTS
from tests.ranks import run_ranks

CASES = [
    ("tcp", "put", "asking"),
    ("default", "get", "asking"),
    ("default", "get", "idle"),
    ("tcp", "get", "asking"),
    pytest.param("default", "put", "asking", marks=pytest.mark.slow),
    pytest.param("tcp", "put", "idle", marks=pytest.mark.slow),
    pytest.param("default", "put", "idle", marks=pytest.mark.slow),
    pytest.param("cma-puts", "put", "asking", marks=pytest.mark.slow),
    pytest.param("cma-puts", "put", "idle", marks=pytest.mark.slow),
]


def killed(rank: int, world: int, store: Any, mode: str, when: str) -> float:
    """Rank 1 is killed in a loop of asks, or when nobody asks it and it asks nobody."""
    lookup = Lookup(tables(rank), store, rank, world, lag=2, timeout=30, close_timeout=3, mode=mode)
    store.set(f"pid {rank}", str(os.getpid()))
    for q in range(world):
        assert (lookup.ask([bags(q, 1, 2)]).wait()[0] == 2.0 * (q + 1)).all()
    meet(store, "ready", world)
    if rank == 1:
        while when == "asking":
            assert [float(each[0, 0]) for each in lookup.ask([bags(0, 1), bags(2, 1, 2)]).wait()] == [1.0, 6.0]
        time.sleep(60)
    if rank == 0:
        time.sleep(0.05)
        os.kill(int(store.get("pid 1")), signal.SIGKILL)
        store.set("killed", "1")
    store.get("killed")
    began = time.monotonic()
    with pytest.raises(PeerFailed) as caught:
        while True:
            lookup.ask([bags(0, 1), bags(1, 1), bags(2, 1)]).wait()
    noticed = time.monotonic() - began
    assert caught.value.rank == 1
    for _ in range(100):
        assert [float(each[0, 0]) for each in lookup.ask([bags(0, 1), bags(2, 1, 2)]).wait()] == [1.0, 6.0]
    meet(store, "checked", world - 1)
    lookup.finish()
    lookup.close()
    return noticed


@pytest.mark.parametrize(("transport", "mode", "when"), CASES)
def test_a_rank_is_killed(transport: str, mode: str, when: str, no_leftovers: None) -> None:
    results = run_ranks(killed, 3, mode, when, env=TRANSPORTS[transport], expect_exit={1: -signal.SIGKILL}, timeout=40)
    assert max(results[0].value, results[2].value) < 5


def stopped(rank: int, world: int, store: Any) -> str:
    """Rank 1 is stopped, over TCP: its rows are late, and right when it goes on."""
    store.set(f"pid {rank}", str(os.getpid()))
    with Lookup(tables(rank), store, rank, world, lag=1, timeout=30) as lookup:
        lookup.ask([bags(1, 1)]).wait()
        meet(store, "ready", world)
        if rank != 0:
            return ""
        pid = int(store.get("pid 1"))
        stop(pid)
        asked = lookup.ask([bags(1, 3, 4), bags(2, 1)])
        with pytest.raises(PeerTimeout) as caught:
            asked.wait(timeout=0.3)
        assert (lookup.ask([bags(2, 1)]).wait()[0] == 3.0).all()
        os.kill(pid, signal.SIGCONT)
        assert [float(found[0, 0]) for found in asked.wait()] == [4.0, 3.0]
        return str(caught.value)


def test_an_owner_is_stopped_over_tcp() -> None:
    assert "not answered by: rank 1 (stopped)" in run_ranks(stopped, 3, env=TRANSPORTS["tcp"])[0].value


def exits(rank: int, world: int, store: Any, mode: str) -> str:
    """Rank 1 ends its process without closing anything."""
    lookup = Lookup(tables(rank), store, rank, world, lag=1, timeout=30, close_timeout=2, mode=mode)
    lookup.ask([bags(1, 1)]).wait()
    meet(store, "ready", world)
    if rank == 1:
        os._exit(0)
    with pytest.raises(PeerFailed) as caught:
        while True:
            lookup.ask([bags(1, 1)]).wait()
    assert (lookup.ask([bags(0, 1), bags(2, 1)]).wait()[1] == 3.0).all()
    meet(store, "told", world - 1)
    lookup.finish()
    lookup.close()
    return str(caught.value)


@pytest.mark.parametrize("mode", ["put", pytest.param("get", marks=pytest.mark.slow)])
def test_an_owner_exits_without_close(mode: str, no_leftovers: None) -> None:
    results = run_ranks(exits, 3, mode, expect_exit={1: 0}, timeout=40)
    assert "rank 1 died: its process has ended" in results[0].value


def scribbled(rank: int, world: int, store: Any, seed: int) -> str:
    """Bytes of rank 1's response windows at rank 0 are changed: right rows or an error; rank 2 is served all along."""
    lookup = Lookup(
        tables(rank), store, rank, world, lag=1, timeout=20, close_timeout=2, checksum=True, response_bytes=64
    )
    said = ""
    meet(store, "ready", world)
    if rank == 0:
        rng = np.random.default_rng(seed)
        data, geometry = lookup._arenas[1].array(), lookup._geometry[1]
        with pytest.raises(WindowCorrupt) as caught:
            for number in range(2000):
                asked = lookup.ask([bags(1, 1, 2), bags(2, 1)])
                time.sleep(0.001)  # most often it is here then
                window = geometry.window(0, 1, number)
                data[window + int(rng.integers(96))] ^= int(rng.integers(1, 256))
                assert [float(found[0, 0]) for found in asked.wait()] == [4.0, 3.0]
        said = str(caught.value)
        assert (lookup.ask([bags(2, 1)]).wait()[0] == 3.0).all()
        store.set("told", "1")
    elif rank == 2:
        while not store.check(["told"]):
            assert (lookup.ask([bags(1, 1, 2), bags(0, 1)]).wait()[0] == 4.0).all()
    else:
        store.get("told")
    lookup.close()
    return said


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
def test_scribbling_into_response_windows(seed: int) -> None:
    said = run_ranks(scribbled, 3, seed, timeout=60)[0].value
    assert "rank 1: its " in said


def two_threads(rank: int, world: int, store: Any) -> int:
    """A second thread that calls the same lookup is refused with a sentence, or gets right rows."""
    from blsrdma.errors import ConcurrentUse

    refused, wrong = 0, list[BaseException]()
    with Lookup(tables(rank), store, rank, world, lag=3) as lookup:

        def ask(count: int) -> None:
            nonlocal refused
            for _ in range(count):
                try:
                    assert (lookup.ask([bags(1, 1, 2)]).wait()[0] == 4.0).all()
                except ConcurrentUse:
                    refused += 1
                except BaseException as error:
                    wrong.append(error)
                    raise

        threads = [threading.Thread(target=ask, args=(300,)) for _ in range(2 if rank == 0 else 0)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    assert not wrong
    return refused


def test_one_thread_at_a_time() -> None:
    run_ranks(two_threads, 2)
