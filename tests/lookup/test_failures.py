"""An owner dies, stops, leaves or writes garbage: who needs it is told, the others go on, nobody hangs."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import blsrdma.lookup_opening
from blsrdma.errors import LookupRefused, PeerFailed, PeerLeft, PeerTimeout, WindowCorrupt
from blsrdma.lookup import Lookup
from blsrdma.lookup_tables import Bags
from tests.patterns import TRANSPORTS
from tests.ranks import run_programs, run_ranks

NOTICED_S = 5.0  # a busy test machine


def stop(pid: int) -> None:
    """Stop a rank: when this returns no thread of it runs any more, the one that serves either."""
    os.kill(pid, signal.SIGSTOP)
    while not all("State:\tT" in (task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir()):
        time.sleep(0.001)


def bags(table: int, *indices: int) -> Bags:
    return Bags(table, torch.tensor(indices), torch.tensor([0, len(indices)]))


def tables(rank: int) -> dict[int, torch.Tensor]:
    return {rank: torch.full((10, 8), float(rank + 1))}


def meet(store: Any, what: str, world: int) -> None:
    store.add(what, 1)
    while store.add(what, 0) < world:
        time.sleep(0.001)


def survive_a_kill(rank: int, world: int, store: Any, settings: dict[str, Any]) -> Any:
    """Rank 1 is killed while it is being asked. Rank 0 needs it; rank 2 asks rank 0 and itself."""
    lookup = Lookup(tables(rank), store, rank, world, lag=2, timeout=30, close_timeout=3, **settings)
    store.set(f"pid {rank}", str(os.getpid()))
    for _ in range(3):
        for q in range(world):
            assert (lookup.ask([bags(q, 1, 2)]).wait()[0] == 2.0 * (q + 1)).all()
    meet(store, "ready", world)
    if rank == 1:
        time.sleep(60)
    died = 0.0
    if rank == 0:
        os.kill(int(store.get("pid 1")), signal.SIGKILL)
        died = time.monotonic()
        store.set("killed", "1")
        failure = None
        while failure is None:
            try:
                lookup.ask([bags(0, 1), bags(1, 1), bags(2, 1)]).wait()
            except PeerFailed as error:
                failure = error
        noticed = time.monotonic() - died
        for _ in range(2 * lookup.lag + 3):  # those that do not need it go on; those that do are told each time
            assert (lookup.ask([bags(2, 1, 1)]).wait()[0] == 6.0).all()
            with pytest.raises(PeerFailed):
                lookup.ask([bags(1, 1)]).wait()
    else:
        store.get("killed")
        for _ in range(300):
            for q in (0, 2):
                assert (lookup.ask([bags(q, 1, 2)]).wait()[0] == 2.0 * (q + 1)).all()
        failure, noticed = None, 0.0
    meet(store, "checked", world - 1)
    lookup.finish()
    closing = time.monotonic()
    lookup.close()
    return failure, noticed, time.monotonic() - closing


@pytest.mark.parametrize(
    ("transport", "settings"),
    [("default", {}), ("default", {"mode": "get"}), ("cma-puts", {}), ("cma-puts", {"mode": "get"}), ("tcp", {})],
    ids=str,
)
def test_an_owner_is_killed(transport: str, settings: dict[str, Any], no_leftovers: None) -> None:
    results = run_ranks(
        survive_a_kill, 3, settings, env=TRANSPORTS[transport], expect_exit={1: -signal.SIGKILL}, timeout=40
    )
    failure, noticed, closing = results[0].value
    assert failure.rank == 1
    assert "rank 1 died: its process has ended" in str(failure) or "connection is lost" in str(failure)
    assert noticed < NOTICED_S
    assert closing < 5
    assert results[2].value[2] < 5


def degrade(rank: int, world: int, store: Any) -> Any:
    settings: dict[str, Any] = {"on_peer_failure": "degrade", "default_row": 0.5, "close_timeout": 2}
    lookup = Lookup(tables(rank), store, rank, world, lag=1, **settings)
    meet(store, "ready", world)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    defaults = 0
    while defaults < 5:
        found = lookup.ask([bags(0, 1), bags(1, 1, 2, 3)]).wait()
        assert (found[0] == 1.0).all()
        assert (found[1] == 6.0).all() or (found[1] == 0.5).all()
        defaults += int((found[1] == 0.5).all())
    stats = lookup.stats()["peers"]
    lookup.finish()
    lookup.close()
    return stats[1]["asked"]["degraded"], stats[0]["asked"]["degraded"]


def test_degraded_answers_are_counted() -> None:
    results = run_ranks(degrade, 3, expect_exit={1: -signal.SIGKILL}, timeout=40)
    assert results[0].value == results[2].value == (5, 0)


def stopped_owner(rank: int, world: int, store: Any, mode: str) -> Any:
    """Rank 1 is stopped. In put mode its rows are late, and exact when it goes on; in get mode they are read all the
    same."""
    store.set(f"pid {rank}", str(os.getpid()))
    lookup = Lookup(tables(rank), store, rank, world, lag=1, timeout=30, mode=mode)
    said = ""
    lookup.ask([bags(1, 1)]).wait()
    meet(store, "ready", world)
    if rank == 0:
        pid = int(store.get("pid 1"))
        stop(pid)
        store.set("stopped", "1")
        asked = lookup.ask([bags(1, 3, 4), bags(2, 1)])
        if mode == "put":
            with pytest.raises(PeerTimeout) as caught:
                asked.wait(timeout=0.3)
            said = str(caught.value)
            assert caught.value.missing == (1,)
        else:
            for _ in range(1000):
                assert (lookup.ask([bags(1, 1, 2, 3)]).wait()[0] == 6.0).all()
        meet(store, "looked", world - 1)
        os.kill(pid, signal.SIGCONT)
        assert [float(found[0, 0]) for found in asked.wait()] == [4.0, 3.0]
    elif rank == 2:
        store.get("stopped")
        for _ in range(100):
            assert (lookup.ask([bags(0, 1), bags(2, 1)]).wait()[1] == 3.0).all()
        meet(store, "looked", world - 1)
    lookup.finish()
    lookup.close()
    return said


@pytest.mark.parametrize(
    ("mode", "transport"), [("put", "default"), ("get", "default"), ("get", "tcp"), ("get", "cma-puts")]
)
def test_an_owner_is_stopped(mode: str, transport: str) -> None:
    """Over TCP memory is not mapped, but another process's can be read all the same (cma); without direct access UCX
    gets it."""
    said = run_ranks(stopped_owner, 3, mode, env=TRANSPORTS[transport])[0].value
    assert mode == "get" or "not answered by: rank 1 (stopped)" in said


def sleeping_owner(rank: int, world: int, store: Any) -> int:
    """Rank 1 sleeps in its own loop, and the others count what they get meanwhile."""
    with Lookup(tables(rank), store, rank, world, lag=0) as lookup:
        lookup.ask([bags(1, 1)]).wait()
        meet(store, "ready", world)
        answers = 0
        if rank == 1:
            time.sleep(0.5)
            store.set("awake", "1")
        while rank == 0 and not store.check(["awake"]):
            lookup.ask([bags(1, 1, 2)]).wait()
            answers += 1
        return answers


@pytest.mark.parametrize("transport", ["default", "cma-puts", "tcp"])
def test_an_owner_that_is_busy_elsewhere_answers(transport: str) -> None:
    assert run_ranks(sleeping_owner, 2, env=TRANSPORTS[transport])[0].value > 10


def raise_in_the_loop(rank: int, world: int, store: Any) -> None:
    with Lookup(tables(rank), store, rank, world, lag=1, close_timeout=2, timeout=20) as lookup:
        lookup.ask([bags(1, 1)]).wait()
        meet(store, "ready", world)
        if rank == 1:
            raise ValueError("row 7 is broken")
        while rank == 0:
            lookup.ask([bags(1, 1)]).wait()
        assert (lookup.ask([bags(2, 1)]).wait()[0] == 3.0).all()


def test_an_owner_raises() -> None:
    zero, one, two = run_ranks(raise_in_the_loop, 3, check=False, timeout=40)
    assert one.error is not None
    assert one.error.type == "ValueError"
    assert zero.error is not None
    assert zero.error.type == "PeerFailed"
    assert "rank 1 failed: ValueError: row 7 is broken" in zero.error.message
    assert two.error is None, two


def leave_early(rank: int, world: int, store: Any) -> str:
    lookup = Lookup(tables(rank), store, rank, world, lag=1, close_timeout=1)
    lookup.ask([bags(1, 1)]).wait()
    meet(store, "ready", world)
    if rank == 1:
        lookup.close()
        return ""
    with pytest.raises(PeerLeft) as caught:
        while True:
            lookup.ask([bags(1, 1)]).wait()
    lookup.close(caught.value)
    return str(caught.value)


def test_an_owner_closes_early() -> None:
    assert "rank 1 left before it answered: it closed the lookup" in run_ranks(leave_early, 2)[0].value


NOT_CLOSED = """
import os
import torch
from blsrdma.errors import PeerFailed
from blsrdma.lookup import Lookup
from blsrdma.lookup_tables import Bags
rank = int(os.environ["RANK"])
lookup = Lookup({rank: torch.ones(10, 8)}, timeout=30)
def ask(table):
    lookup.ask([Bags(table, torch.tensor([1]), torch.tensor([0, 1]))]).wait()
ask(1 - rank)
lookup._store.add("asked", 1)
while lookup._store.add("asked", 0) < 2:
    pass
while rank == 1:
    try:
        ask(0)
    except PeerFailed as error:
        print(error)
        lookup.close(error)
        break
"""


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["default", "tcp"])
def test_interpreter_exit_without_close(transport: str) -> None:
    ended = run_programs(NOT_CLOSED, 2, TRANSPORTS[transport])
    assert [each.status for each in ended] == [0, 0], ended
    assert ended[0].err == "lookup 'lookup' was not closed before the interpreter ended\n"
    assert "rank 0 failed: BlsrdmaError: the interpreter ended without close()" in ended[1].out


# --- what peers write is not believed


def memory(lookup: Lookup, plane: int) -> Any:
    return lookup._arenas[plane].array()


def garbage_in_requests(rank: int, world: int, store: Any, what: str) -> str:
    """What lies in rank 1's request windows is scribbled over while rank 0 asks; rank 2 is served all along."""
    lookup = Lookup(tables(rank), store, rank, world, lag=0, timeout=20, close_timeout=2, request_bytes=512)
    said = ""
    meet(store, "ready", world)
    geometry = lookup._geometry[0]
    if rank == 1:
        rng = np.random.default_rng(0)
        window = geometry.window(1, 0, 0)
        data = memory(lookup, 0)
        while not store.check(["told"]):
            if what == "header":
                data[window : window + 64] = rng.integers(0, 256, 64, np.uint8)
            elif what == "payload":
                data[window + 64 : window + 64 + 48] = rng.integers(0, 256, 48, np.uint8)
            else:  # a counter that no client can have written, with the right check word
                value = 1 << 40
                words = data[geometry.control_offset :][:16].view(np.uint64)
                words[:] = value, ~value & (2**64 - 1) ^ lookup._epoch
    elif rank == 0:
        with pytest.raises((LookupRefused, PeerTimeout, WindowCorrupt)) as caught:
            for _ in range(100_000):
                lookup.ask([bags(1, 1)]).wait(timeout=1)
        said = type(caught.value).__name__
        store.set("told", "1")
    if rank == 2:
        while not store.check(["told"]):
            assert (lookup.ask([bags(1, 1, 2)]).wait()[0] == 4.0).all()
    meet(store, "over", world)  # who closes early leaves those who still ask
    lookup.close()
    return said


@pytest.mark.parametrize(
    ("what", "error"), [("header", "LookupRefused"), ("payload", "LookupRefused"), ("counter", "PeerTimeout")]
)
def test_garbage_in_request_windows(what: str, error: str) -> None:
    results = run_ranks(garbage_in_requests, 3, what, timeout=60)
    assert results[0].value == error


def unchecked(rank: int, world: int, store: Any) -> list[str]:
    """Rank 0 believes in tables that are larger, or elsewhere: their owner refuses, and tells it alone."""
    if rank == 0:
        honest = blsrdma.lookup_opening.directory

        def lying(of_ranks: Any) -> Any:
            facts = honest(of_ranks)
            return [replace(facts[0]), replace(facts[1], rows=1 << 50), replace(facts[2], owner=1)]

        blsrdma.lookup_opening.directory = lying
    lookup = Lookup(tables(rank), store, rank, world, lag=2, timeout=20, close_timeout=2)
    said = []
    if rank == 0:
        for bad in (bags(1, 5, 10), bags(1, 2, 1 << 40, 1), bags(2, 1)):
            with pytest.raises(LookupRefused) as caught:
                lookup.ask([bad, bags(1, 1)]).wait()
            said.append(str(caught.value))
            assert caught.value.rank == 1
        assert (lookup.ask([bags(1, 1)]).wait()[0] == 2.0).all()
        store.set("told", "1")
    while rank == 2 and not store.check(["told"]):
        assert (lookup.ask([bags(1, 1, 2)]).wait()[0] == 4.0).all()
    lookup.finish()
    assert rank != 1 or lookup.stats()["peers"][0]["served"]["refused"] == 3
    lookup.close()
    return said


def test_the_owner_checks_indices_too() -> None:
    said = run_ranks(unchecked, 3)[0].value
    assert said[0].endswith("rank 1 refused it: index 10 of table 1 is not a row of its 10 rows")
    assert said[1].endswith(f"rank 1 refused it: index {1 << 40} of table 1 is not a row of its 10 rows")
    assert said[2].endswith("rank 1 refused it: it does not own the table asked for (2)")


def garbage_in_responses(rank: int, world: int, store: Any, what: str) -> str:
    lookup = Lookup(tables(rank), store, rank, world, lag=0, timeout=20, close_timeout=2)
    said = ""
    meet(store, "ready", world)
    if rank == 0:
        geometry, data = lookup._geometry[1], memory(lookup, 1)
        if what == "counter":
            epoch = lookup._epoch ^ 0x9E3779B97F4A7C15
            data[geometry.control_offset + 512 :][:16].view(np.uint64)[:] = 7, ~7 & (2**64 - 1) ^ epoch
        asked = lookup.ask([bags(1, 1), bags(2, 1)])
        if what == "header":
            pid = int(store.get("pid 1"))
            asked.wait()
            stop(pid)
            asked = lookup.ask([bags(1, 1), bags(2, 1)])
            window = geometry.window(0, 1, 1)
            data[window : window + 64] = 0xA5
            epoch = lookup._epoch ^ 0x9E3779B97F4A7C15
            data[geometry.control_offset + 512 :][:16].view(np.uint64)[:] = 2, ~2 & (2**64 - 1) ^ epoch
        with pytest.raises(WindowCorrupt) as caught:
            asked.wait()
        assert (lookup.ask([bags(2, 1)]).wait()[0] == 3.0).all()
        if what == "header":
            os.kill(pid, signal.SIGCONT)
        said = str(caught.value)
        store.set("told", "1")
    else:
        store.set(f"pid {rank}", str(os.getpid()))
        store.get("told")
    lookup.close()
    return said


@pytest.mark.parametrize("what", ["header", "counter"])
def test_garbage_in_response_windows(what: str) -> None:
    said = run_ranks(garbage_in_responses, 3, what, timeout=60)[0].value
    assert "rank 1: its header does not match" in said or "rank 1: its response counter says 7, of " in said
