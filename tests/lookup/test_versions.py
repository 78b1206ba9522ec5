"""New versions of the tables, swapped in while everybody asks: every ask has the bits of the version that it names."""

from __future__ import annotations

import gc
import os
import signal
import time
import weakref
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from blsrdma.errors import LookupRefused, PeerFailed, PeerTimeout, VersionError
from blsrdma.lookup import Lookup
from blsrdma.lookup_tables import Bags, Rows, hot_rows
from tests.lookup.bags import DIMS, FORMATS, draw, pooled, rows, same_bits
from tests.patterns import TRANSPORTS
from tests.ranks import run_ranks

VERSIONS = (3, 4, 9, 10, 1000)


def plan(seed: int, ranks: int) -> tuple[dict[int, dict[int, Rows]], list[int]]:
    """Tables of random sizes and formats, all versions of them, and who owns each; ranks may own none."""
    rng = np.random.default_rng(seed)
    versions: dict[int, dict[int, Rows]] = {version: {} for version in VERSIONS}
    owners = []
    for number in range(int(rng.integers(2, 8))):
        format_ = FORMATS[rng.integers(len(FORMATS))]
        dim = int(rng.choice(DIMS)) * (2 if format_ == "int4" else 1)
        count = int(rng.integers(1, 300))
        for version in VERSIONS:
            versions[version][number] = rows(1000 * version + number, count, dim, format_)
        owners.append(int(rng.integers(ranks)))
    return versions, owners


def exact(rank: int, world: int, store: Any, seed: int, settings: dict[str, Any], asks: int) -> list[int]:
    """Each rank loads the next version when it likes; how many asks were answered from each version."""
    versions, owners = plan(seed, world)
    rng = np.random.default_rng([seed, rank])

    def own(version: int) -> dict[int, Rows]:
        return {t: versions[version][t] for t, owner in enumerate(owners) if owner == rank}

    seen: list[int] = []
    coming = deque(VERSIONS[1:])
    with Lookup(own(VERSIONS[0]), store, rank, world, version=VERSIONS[0], updates=True, **settings) as lookup:
        if settings.get("fetch") == "rows":
            for table, owner in enumerate(owners):
                if owner != rank:
                    count = len(versions[VERSIONS[0]][table].data)
                    lookup.keep(table, hot_rows(rng.integers(0, count, 100), 20))
        open_asks: deque[tuple[Any, list[Bags]]] = deque()

        def check() -> None:
            asked, bags = open_asks.popleft()
            found = asked.wait()
            seen.append(asked.version)
            for each, got in zip(bags, found, strict=True):
                assert same_bits(got, pooled(versions[asked.version][each.table], each)), (asked.version, each.table)

        number = 0
        while number < asks or not seen or seen[-1] != VERSIONS[-1]:
            number += 1
            if coming and rng.random() < 0.1:
                lookup.load_tables(coming[0], own(coming[0]))
                coming.popleft()
            some = [t for t in range(len(owners)) if rng.random() < 0.8]
            bags = [
                draw(rng, t, len(versions[3][t].data), int(rng.integers(0, 12)), int(rng.choice([1, 5, 40])))
                for t in some
            ]
            open_asks.append((lookup.ask(bags), bags))
            while open_asks and (len(open_asks) > lookup.lag + 1 or (rng.random() < 0.3 and open_asks[0][0].ready())):
                check()
            assert number < 100_000
        while open_asks:
            check()
        assert lookup.version == lookup.stats()["version"] == VERSIONS[-1]
    assert seen == sorted(seen)
    return [seen.count(version) for version in VERSIONS]


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "put": ({"lag": 3}, {}),
    "get": ({"lag": 2, "mode": "get"}, {}),
    "get, cma": ({"lag": 1, "mode": "get", "fetch": "rows", "cache_bytes": 5000}, TRANSPORTS["tcp"]),
    "get, ucp_get": ({"lag": 2, "mode": "get"}, TRANSPORTS["cma-puts"]),
    "rows, cached and kept": ({"lag": 3, "fetch": "rows", "cache_bytes": 20000}, {}),
    "cut, tcp": ({"lag": 1, "request_bytes": 400, "response_bytes": 1100}, TRANSPORTS["tcp"]),
    "inline": ({"lag": 0, "serve": "inline"}, {}),
    "rows, cma puts": ({"lag": 2, "fetch": "rows", "cache_bytes": 5000}, TRANSPORTS["cma-puts"]),
}


SLOWER = ("inline", "rows, cma puts")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOWER else ()) for name in SETTINGS]
)
def test_every_ask_is_of_one_version(name: str, no_leftovers: None) -> None:
    settings, env = SETTINGS[name]
    results = run_ranks(exact, 3, 11, settings, 40, env=env, timeout=60)
    assert all(result.value[-1] > 0 for result in results)
    assert sum(result.value[0] for result in results) > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30))
def test_random_placements_and_versions(seed: int) -> None:
    settings, env = SETTINGS[list(SETTINGS)[seed % len(SETTINGS)]]
    run_ranks(exact, 1 + seed % 4, 500 + seed, settings, 100, env=env, timeout=120)


def bags(table: int, *indices: int) -> Bags:
    return Bags(table, torch.tensor(indices), torch.tensor([0, len(indices)]))


def table(rank: int, version: int) -> dict[int, torch.Tensor]:
    return {rank: torch.full((10, 8), float(100 * version + rank + 1))}


def meet(store: Any, what: str, world: int) -> None:
    store.add(what, 1)
    while store.add(what, 0) < world:
        time.sleep(0.001)


def slow_to_move(rank: int, world: int, store: Any) -> str:
    """Rank 1 makes no call: there is room for one more version, not for two. The old one is let go when it moves on."""
    first = torch.full((10, 8), 1.0)
    there = weakref.ref(first)
    with Lookup({rank: first}, store, rank, world, lag=1) as lookup:
        del first
        lookup.load_tables(1, table(rank, 1))
        meet(store, "loaded", world)
        said = ""
        if rank == 0:
            assert (lookup.ask([bags(1, 2)]).wait()[0] == 102.0).all()
            assert lookup.version == 1
            with pytest.raises(PeerTimeout) as caught:
                lookup.load_tables(2, table(rank, 2), timeout=0.2)
            assert caught.value.missing == (1,)
            said = str(caught.value)
            gc.collect()
            assert there() is not None
            store.set("told", "1")
        else:
            store.get("told")
            assert (lookup.ask([bags(0, 2)]).wait()[0] == 101.0).all()
        meet(store, "moved", world)
        lookup.ask([bags(0, 1)]).wait()
        lookup.load_tables(2, table(rank, 2))
        gc.collect()
        assert there() is None
        while lookup.ask([bags(0, 1)]).version != 2:
            time.sleep(0.001)
        meet(store, "over", world)
    return said


def test_an_owner_has_two_versions_at_most() -> None:
    said = run_ranks(slow_to_move, 2)[0].value
    assert said == "lookup 'lookup': version 2 cannot be loaded yet; not gone over to version 1: rank 1 (alive)"


def refused(rank: int, world: int, store: Any, settings: dict[str, Any]) -> list[str]:
    said = []
    with Lookup(table(rank, 0), store, rank, world, version=5, **settings) as lookup:
        for version, tables in [
            (5, table(rank, 1)),
            (-1, table(rank, 1)),
            (1 << 62, table(rank, 1)),
            (6, {}),
            (6, {rank: torch.zeros(10, 8), 9: torch.zeros(10, 8)}),
            (6, {rank: torch.zeros(11, 8)}),
            (6, {rank: torch.zeros(10, 8).half()}),
            (6, {rank: torch.zeros(10)}),
        ]:
            with pytest.raises(VersionError) as caught:
                lookup.load_tables(version, tables)
            said.append(str(caught.value))
        if settings:
            with pytest.raises(VersionError, match="mode get has no room for another version: set updates"):
                lookup.load_tables(6, table(rank, 1))
        else:  # ranks 0 and 1 load different ones
            if rank == 0:
                lookup.load_tables(6, table(rank, 1))
            meet(store, "loaded", world)
            if rank == 1:
                with pytest.raises(VersionError) as caught:
                    lookup.load_tables(7, table(rank, 1))
                said.append(str(caught.value))
            assert (lookup.ask([bags(0, 1)]).wait()[0] == 1.0).all()
        meet(store, "over", world)
    return said


@pytest.mark.parametrize("settings", [{}, {"mode": "get"}], ids=str)
def test_what_cannot_follow_is_refused(settings: dict[str, Any]) -> None:
    said = run_ranks(refused, 2, settings)[1].value
    assert said[0] == "version 5 cannot follow version 5: versions rise, up to 2^62 - 1"
    assert said[3] == "a version of the tables []: this rank owns [1], and needs all of them"
    assert said[5] == "table 1: 11 x 8 fp32 rows, where its first version has 10 x 8 fp32"
    assert said[6] == "table 1: 10 x 8 fp16 rows, where its first version has 10 x 8 fp32"
    if not settings:
        assert said[8] == "lookup 'lookup': rank 0 has loaded version 6, where this rank loads 7"


def false_word(rank: int, world: int, store: Any) -> str:
    """Somebody has written into rank 0's memory that rank 1 has a version 7."""
    lookup = Lookup(table(1, 0) if rank == 1 else {}, store, rank, world, close_timeout=2)
    said = ""
    if rank == 0:
        assert (lookup.ask([bags(1, 1)]).wait()[0] == 2.0).all()
        data = lookup._arenas[1].array()
        epoch = lookup._epoch ^ 0x9E3779B97F4A7C15
        at = lookup._geometry[1].control_offset + 512 + 80
        data[at : at + 16].view(np.uint64)[:] = 7, ~7 & (2**64 - 1) ^ epoch
        with pytest.raises(LookupRefused) as caught:
            lookup.ask([bags(1, 1)]).wait()
        said = str(caught.value)
        store.set("told", "1")
    else:
        store.get("told")
    lookup.close()
    return said


def test_a_version_that_an_owner_does_not_have_is_refused() -> None:
    said = run_ranks(false_word, 2)[0].value
    assert said == "lookup 'lookup', ask 1: rank 1 refused it: it does not have version 7 of its tables"


def overwritten(rank: int, world: int, store: Any) -> str:
    """Rank 1 puts other rows where rank 0 reads: rank 0 does not believe what it has read."""
    lookup = Lookup(table(rank, 0), store, rank, world, mode="get", updates=True, close_timeout=2)
    said = ""
    if rank == 0:
        assert (lookup.ask([bags(1, 1)]).wait()[0] == 2.0).all()
        meet(store, "read", world)
        store.get("written")
        with pytest.raises(PeerFailed) as caught:
            lookup.ask([bags(1, 1), bags(0, 1)]).wait()
        said = str(caught.value)
        assert (lookup.ask([bags(0, 1)]).wait()[0] == 1.0).all()
    else:
        meet(store, "read", world)
        lookup._arenas[2].array()[64:72].view(np.uint64)[0] = 1
        store.set("written", "1")
    meet(store, "over", world)
    lookup.close()
    return said


@pytest.mark.parametrize("transport", ["default", "tcp", "cma-puts"])
def test_rows_that_may_have_changed_are_not_used(transport: str) -> None:
    said = run_ranks(overwritten, 2, env=TRANSPORTS[transport])[0].value
    assert "it has put other tables where version 0 was read" in said


def dies(rank: int, world: int, store: Any, settings: dict[str, Any]) -> Any:
    """Rank 1 is killed when the others have loaded version 1, and it has not: they go over to it, and to version 2."""
    store.set(f"pid {rank}", str(os.getpid()))
    lookup = Lookup(table(rank, 0), store, rank, world, lag=1, timeout=30, close_timeout=2, updates=True, **settings)
    assert (lookup.ask([bags(1, 1)]).wait()[0] == 2.0).all()
    if rank != 1:
        lookup.load_tables(1, table(rank, 1))
        asked = lookup.ask([bags(0, 1), bags(1, 1), bags(2, 1)])
        assert [float(each[0, 0]) for each in asked.wait()] == [1.0, 2.0, 3.0]  # rank 1 has only version 0
        assert asked.version == 0
    meet(store, "loaded", world)
    if rank == 1:
        time.sleep(60)
    if rank == 0:
        os.kill(int(store.get("pid 1")), signal.SIGKILL)
    for version in (1, 2):
        if version == 2:
            lookup.load_tables(2, table(rank, 2))
        while True:
            asked = lookup.ask([bags(0, 1), bags(2, 1)])
            found = [float(each[0, 0]) for each in asked.wait()]
            assert found == [100 * asked.version + 1, 100 * asked.version + 3]
            if asked.version == version:
                break
            time.sleep(0.001)
        with pytest.raises(PeerFailed):
            lookup.ask([bags(1, 1)]).wait()
    lookup.finish()
    lookup.close()
    return lookup.memory_bytes


@pytest.mark.parametrize(
    ("transport", "settings"),
    [("default", {"mode": "get"}), ("tcp", {}), pytest.param("default", {}, marks=pytest.mark.slow)],
    ids=str,
)
def test_an_owner_dies_during_an_update(transport: str, settings: dict[str, Any], no_leftovers: None) -> None:
    run_ranks(dies, 3, settings, env=TRANSPORTS[transport], expect_exit={1: -signal.SIGKILL}, timeout=40)
