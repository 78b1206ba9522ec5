"""Finding each other: mismatches name ranks and values, stale stores are seen through, missing ranks are named."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed import HashStore, TCPStore

from blsrdma.errors import RendezvousError, SettingsError, SettingsMismatch
from blsrdma.rendezvous import Rendezvous
from tests.ranks import store_server


def ranks(*actions: Callable[[], Any]) -> list[Any]:
    """Run each action in a thread; what it returned or raised, in order."""
    outcomes: list[Any] = [None] * len(actions)

    def run(index: int) -> None:
        try:
            outcomes[index] = actions[index]()
        except Exception as error:
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(actions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "a rank hangs in the rendezvous"
    return outcomes


def clients(count: int) -> tuple[Any, list[Any]]:
    server = store_server()
    return server, [TCPStore("127.0.0.1", server.port, is_master=False) for _ in range(count)]


def meet(store: Any, rank: int, world: int, timeout: float = 10.0, name: str = "x", **agreed: Any) -> Callable[[], Any]:
    def action() -> Any:
        rendezvous = Rendezvous(store, name, rank, world, timeout)
        met = rendezvous.meet(agreed, {"rank": rank, "address": bytes([rank, 255])})
        rendezvous.confirm(None)
        return met

    return action


def test_everyone_gets_every_blob_and_one_epoch() -> None:
    _server, stores = clients(4)
    for attempt in range(3):  # on the same store: from the second on it is dirty
        met = ranks(*(meet(stores[r], r, 4, lag=attempt) for r in range(4)))
        for each in met:
            assert each.blobs == [{"rank": r, "address": bytes([r, 255])} for r in range(4)]
        assert len({each.epoch for each in met}) == 1


def test_one_rank_alone() -> None:
    assert meet(HashStore(), 0, 1)().blobs == [{"rank": 0, "address": b"\x00\xff"}]


def test_disagreement_names_ranks_and_values() -> None:
    _server, stores = clients(3)
    for outcome in ranks(*(meet(stores[r], r, 3, lag=3 + (r == 2), window_bytes=64) for r in range(3))):
        assert isinstance(outcome, SettingsMismatch)
        assert str(outcome) == "ranks disagree: lag is 3 on ranks 0, 1; 4 on rank 2"


def test_different_ideas_of_the_world() -> None:
    _server, stores = clients(3)
    for worlds in ([2, 3, 3], [3, 2, 3]):
        outcomes = ranks(*(meet(stores[r], r, worlds[r], name=str(worlds)) for r in range(3)))
        for outcome in outcomes:
            assert isinstance(outcome, SettingsMismatch), outcomes
            assert "world_size is" in str(outcome)


def test_missing_ranks_are_named() -> None:
    _server, stores = clients(2)
    started = time.monotonic()
    outcomes = ranks(*(meet(stores[r], r, 4, timeout=0.5 + r) for r in range(2)))
    assert time.monotonic() - started < 5
    for outcome in outcomes:
        assert isinstance(outcome, RendezvousError)
        assert str(outcome) == "ranks 2, 3 have not come within 0.5 s"
    lonely = ranks(meet(stores[1], 1, 2, timeout=0.3, name="y"))[0]
    assert str(lonely) == "rank 0 has not answered within 0.3 s"


def test_stale_hellos_are_not_believed() -> None:
    """What an earlier incarnation left in the store is waited out, not connected to."""
    _server, stores = clients(3)
    ranks(*(meet(stores[r], r, 3, lag=1) for r in range(3)))

    def late() -> Any:
        time.sleep(0.5)
        return meet(stores[2], 2, 3, lag=2)()

    met = ranks(meet(stores[0], 0, 3, lag=2), meet(stores[1], 1, 3, lag=2), late)
    assert all(each.epoch == met[0].epoch for each in met)


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_refuses_is_named(culprit: int) -> None:
    _server, stores = clients(3)

    def refuse() -> None:
        Rendezvous(stores[culprit], "x", culprit, 3, 10).report(SettingsError("lag = -1: must be >= 0"))

    started = time.monotonic()
    outcomes = ranks(*(refuse if r == culprit else meet(stores[r], r, 3) for r in range(3)))
    assert time.monotonic() - started < 5
    for rank, outcome in enumerate(outcomes):
        if rank != culprit:
            assert isinstance(outcome, RendezvousError)
            assert str(outcome) == f"rank {culprit} failed: SettingsError: lag = -1: must be >= 0"


def test_a_rank_that_cannot_connect_is_named() -> None:
    _server, stores = clients(2)

    def connect(rank: int) -> Callable[[], Any]:
        def action() -> None:
            rendezvous = Rendezvous(stores[rank], "x", rank, 2, 10)
            rendezvous.meet({}, {})
            rendezvous.confirm(OSError("no route") if rank == 1 else None)

        return action

    for outcome in ranks(connect(0), connect(1)):
        assert isinstance(outcome, RendezvousError)
        assert str(outcome) == "rank 1 could not connect: OSError: no route"


def test_a_rank_outside_the_world() -> None:
    with pytest.raises(SettingsError, match=r"rank = 4: must be in 0 \.\. world_size - 1 = 3"):
        Rendezvous(HashStore(), "x", 4, 4, 1)
