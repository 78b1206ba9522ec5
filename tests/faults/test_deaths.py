"""A rank dies or stops: every survivor gets the right error in time, whatever it does, and leaves nothing behind."""

from __future__ import annotations

import os
import select
import signal
import time

import numpy as np
import pytest

from blsrdma import Exchange
from blsrdma.errors import PeerFailed, PeerTimeout
from tests.patterns import TRANSPORTS
from tests.ranks import run_ranks

NOTICED_S = 2.0  # within this on one host; a busy test machine is given some more
BUSY_S = 3.0


def wait_until(condition) -> None:
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _survive(rank, world, store, when, survivor):
    """Rank 1 dies while it posts, waits or is idle; the others wait, or post on and on, or poll. They say what they
    met."""
    exchange = Exchange(store, rank, world, lag=2, window_bytes=4096, timeout=30, close_timeout=5)
    for _ in range(3):
        with exchange.post(np.zeros(world * 1024, np.float32)):
            pass
    store.add("ready", 1)
    if rank == 1:
        while store.add("ready", 0) < world:  # a put of this rank's may still be on its way to them
            time.sleep(0.001)
        store.set("dies", str(time.monotonic()))
        if when == "posting":
            while True:  # killed from outside, in the middle of one of these
                with exchange.post(np.zeros(world * 1024, np.float32)):
                    pass
        if when == "waiting":
            with exchange.post(np.zeros(world * 1024, np.float32)):
                _die()
        _die()
    if when == "posting" and rank == 0:
        time.sleep(0.1)
        os.kill(int(store.get("pid 1")), signal.SIGKILL)
        store.set("killed", str(time.monotonic()))
    failure = None
    try:
        if survivor == "idle":
            time.sleep(BUSY_S)  # in no call at all
            exchange.begin()
        while True:
            handle = exchange.post(np.zeros(world * 1024, np.float32))
            if survivor == "polling":
                while not handle.ready():
                    time.sleep(0.001)
            handle.wait()
            handle.release()
    except PeerFailed as error:
        failure, noticed = error, time.monotonic()
    for call in (exchange.begin, lambda: exchange.post(np.zeros(world, np.float32)), exchange.stats):
        with pytest.raises(PeerFailed) as again:
            call()
        assert again.value.rank == failure.rank
    closing = time.monotonic()
    exchange.close(failure)
    return failure, noticed, time.monotonic() - closing


def _with_pid(rank, world, store, *args):
    store.set(f"pid {rank}", str(os.getpid()))
    return (*_survive(rank, world, store, *args), float(store.get("killed" if args[0] == "posting" else "dies")))


@pytest.mark.parametrize("when", ["posting", "waiting", "idle"])
@pytest.mark.parametrize(
    ("transport", "survivor"),
    [("default", "waiting"), ("default", "polling"), ("cma-puts", "waiting"), ("posix-puts", "polling"),
     ("tcp", "waiting"), ("tcp", "idle")],
)  # fmt: skip
def test_every_survivor_of_a_kill_is_told(transport: str, when: str, survivor: str, no_leftovers: None) -> None:
    results = run_ranks(
        _with_pid, 3, when, survivor, env=TRANSPORTS[transport], expect_exit={1: -signal.SIGKILL}, timeout=40
    )
    for result in (results[0], results[2]):
        failure, noticed, closing, died = result.value
        assert failure.rank == 1, failure
        assert "rank 1 died" in str(failure) or "rank 1 failed: as rank" in str(failure)
        assert noticed - died < NOTICED_S + BUSY_S
        assert closing < 6


def _noticed_in_no_call(rank, world, store):
    """How long after the death a survivor that only looks now and then is told."""
    exchange = Exchange(store, rank, world, timeout=30)
    with exchange.post(np.zeros(world)):
        pass
    store.add("ready", 1)
    if rank == 1:
        while store.add("ready", 0) < world:
            time.sleep(0.001)
        store.set("dies", str(time.monotonic()))
        _die()
    died = float(store.get("dies"))
    while True:
        try:
            exchange.stats()
        except PeerFailed:
            return time.monotonic() - died
        time.sleep(0.01)


@pytest.mark.parametrize("transport", ["default", "tcp"])
def test_a_death_is_noticed_at_once(transport: str) -> None:
    results = run_ranks(_noticed_in_no_call, 3, env=TRANSPORTS[transport], expect_exit={1: -signal.SIGKILL})
    assert all(results[rank].value < NOTICED_S for rank in (0, 2))


def _stopped(rank, world, store, seconds):
    """Rank 1 is stopped for a while; the others run on to the bound, time out once, wait, and go on when it does."""
    store.set(f"pid {rank}", str(os.getpid()))
    lag = 2
    with Exchange(store, rank, world, lag=lag, timeout=60) as exchange:
        for i in range(3):
            with exchange.post(np.full(world, i)):
                pass
        if rank == 2:
            store.set("three", "1")
        if rank == 0:
            pid = int(store.get("pid 1"))
            store.get("three")  # of its messages to rank 2, too, none is on its way when it is stopped
            os.kill(pid, signal.SIGSTOP)
            stopped_at = time.monotonic()
        if rank == 1:  # it must not run on to the bound itself before the signal comes
            store.get("continued")
        handles = []
        for i in range(3, 12):
            if rank == 2 and i == 3 + lag + 1:
                store.set("at the bound", "1")
            if rank == 0 and i == 3 + lag + 1:
                store.get("at the bound")  # of rank 2, whatever else the machine does, nothing is missing
                with pytest.raises(PeerTimeout) as caught:
                    exchange.begin(timeout=1)
                assert caught.value.missing == (1,)
                assert caught.value.states == {1: "stopped"}
                assert "rank 1 (stopped; " in str(caught.value)
                time.sleep(max(0, seconds - (time.monotonic() - stopped_at)))
                store.set("continued", "1")
                os.kill(pid, signal.SIGCONT)
            exchange.begin()
            if len(handles) > lag:
                with handles.pop(0) as received:
                    assert [int(each[0]) for each in received] == [i - lag - 1] * world
            handles.append(exchange.post(np.full(world, i)))
        for handle in handles:
            with handle:
                pass
        return exchange.stats()["max_lead"]


@pytest.mark.parametrize("transport", ["default", "tcp"])
def test_slow_is_not_dead(transport: str) -> None:
    results = run_ranks(_stopped, 3, 5.0, env=TRANSPORTS[transport], timeout=60)
    assert results[0].value == 2


def _killed_while_pulled(rank, world, store, size):
    store.set(f"pid {rank}", str(os.getpid()))
    exchange = Exchange(store, rank, world, window_bytes=0, timeout=30)
    counts = [0] * world
    if rank == 1:
        counts[0] = size
    handle = exchange.post(np.ones(sum(counts), np.uint8), counts)
    if rank == 1:
        handle.wait()
        time.sleep(60)
    pid = int(store.get("pid 1"))
    if rank == 2:
        while not handle.ready():
            time.sleep(0.001)
        store.get("pulling")
        time.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
    try:
        while not handle.ready():
            time.sleep(0.001)
        store.set("pulling", "1")
        received = handle.wait()
        if rank == 0:
            assert (received[1] == 1).all()  # it was faster than the kill
        handle.release()
        exchange.post(np.zeros(world, np.uint8)).wait()
    except PeerFailed as failure:
        exchange.close(failure)
        return failure.rank
    return None


@pytest.mark.parametrize("transport", ["default", "posix-puts", "tcp-puts"])
def test_a_sender_dies_while_its_message_is_pulled(transport: str, no_leftovers: None) -> None:
    size = 200 << 20
    results = run_ranks(_killed_while_pulled, 3, size, env=TRANSPORTS[transport], expect_exit={1: -signal.SIGKILL})
    assert [results[rank].value for rank in (0, 2)] == [1, 1]


def _left_before_it_was_pulled(rank, world, store):
    """Rank 1 closes and ends although rank 0 has not taken its large message."""
    exchange = Exchange(store, rank, world, window_bytes=0, timeout=30, close_timeout=0.2)
    counts = [5000, 0] if rank == 1 else [0, 0]
    handle = exchange.post(np.ones(sum(counts), np.uint8), counts)
    handle.wait() if rank == 1 else wait_until(handle.ready)
    if rank == 1:
        exchange.close()
        store.set("pid 1", str(os.getpid()))
        return None
    pidfd = os.pidfd_open(int(store.get("pid 1")))
    assert select.select([pidfd], [], [], 30)[0]
    began = time.monotonic()
    with pytest.raises(PeerFailed) as failure:
        handle.wait()
    assert time.monotonic() - began < NOTICED_S + BUSY_S
    exchange.close(failure.value)
    return str(failure.value)


@pytest.mark.parametrize("transport", ["default", "posix-puts", "cma-puts", "tcp-puts"])
def test_a_sender_leaves_before_its_message_is_pulled(transport: str, no_leftovers: None) -> None:
    results = run_ranks(_left_before_it_was_pulled, 2, env=TRANSPORTS[transport])
    assert "iteration 0: rank 1 died: " in results[0].value
