"""Lookups of any tables of any rank have torch's bits, in every mode, over every path, however they are cut."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from blsrdma.errors import (
    BagsError,
    ExchangeClosed,
    MemoryLimitExceeded,
    PeerTimeout,
    ReadsUnavailable,
    RendezvousError,
    SettingsError,
    SettingsMismatch,
)
from blsrdma.lookup import Lookup
from blsrdma.lookup_choice import Choice
from blsrdma.lookup_settings import LookupSettings
from blsrdma.lookup_tables import Bags, Rows, describe, hot_rows
from tests.lookup.bags import DIMS, FORMATS, draw, pooled, rows, same_bits
from tests.patterns import TRANSPORTS
from tests.ranks import run_ranks


def plan(seed: int, ranks: int) -> tuple[dict[int, Rows], list[int]]:
    """Tables of random sizes and formats, and who owns each; ranks may own none."""
    rng = np.random.default_rng(seed)
    tables = {}
    for number in range(int(rng.integers(1, 10))):
        format_ = FORMATS[rng.integers(len(FORMATS))]
        dim = int(rng.choice(DIMS)) if format_ != "int4" else 2 * int(rng.choice(DIMS))
        tables[3 * number + 1] = rows(number, int(rng.integers(1, 400)), dim, format_)
    return tables, [int(rng.integers(ranks)) for _ in tables]


def exact(rank: int, world: int, store: Any, seed: int, settings: dict[str, Any], asks: int) -> dict[str, Any]:
    """Ranks ask for different things, different numbers of times, and keep several asks open."""
    tables, owners = plan(seed, world)
    own = {table: tables[table] for table, owner in zip(tables, owners, strict=True) if owner == rank}
    rng = np.random.default_rng([seed, rank])
    mean = settings.get("pooling") == "mean"
    checked = 0
    with Lookup(own, store, rank, world, **settings) as lookup:
        open_asks: deque[tuple[Any, list[torch.Tensor]]] = deque()

        def check() -> int:
            asked, wanted = open_asks.popleft()
            for found, want in zip(asked.wait(), wanted, strict=True):
                assert same_bits(found, want)
            return len(wanted)

        for _ in range(asks + 7 * rank):
            some = [table for table in tables if rng.random() < 0.8]
            bags = [
                draw(rng, t, len(tables[t].data), int(rng.integers(0, 20)), int(rng.choice([1, 5, 60]))) for t in some
            ]
            wanted = [pooled(tables[each.table], each, mean) for each in bags]
            out = [torch.full((len(w), 3, w.shape[1]), 7.0)[:, 1] if rng.random() < 0.5 else None for w in wanted]
            open_asks.append((lookup.ask(bags, out), wanted))
            while open_asks and (len(open_asks) > lookup.lag + 2 or (rng.random() < 0.3 and open_asks[0][0].ready())):
                checked += check()
        while open_asks:
            checked += check()
        stats = lookup.stats()
    return {"checked": checked, "stats": stats}


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "put": ({"lag": 2}, {}),
    "put, cut": ({"lag": 1, "request_bytes": 128, "response_bytes": 1024}, {}),
    "put, lag 0, mean": ({"lag": 0, "pooling": "mean", "request_bytes": 500}, {}),
    "UCX puts": ({"lag": 2, "direct": False}, {}),
    "tcp, cut": ({"lag": 3, "request_bytes": 400, "response_bytes": 2000, "checksum": True}, TRANSPORTS["tcp"]),
    "cma puts": ({"lag": 1}, TRANSPORTS["cma-puts"]),
    "inline": ({"lag": 2, "serve": "inline"}, {}),
    "inline, tcp": ({"lag": 0, "serve": "inline"}, TRANSPORTS["tcp"]),
    "get": ({"lag": 2, "mode": "get"}, {}),
    "get, cma": ({"lag": 1, "mode": "get", "fetch": "rows", "cache_bytes": 20000}, TRANSPORTS["tcp"]),
    "get, ucp_get": ({"lag": 2, "mode": "get"}, TRANSPORTS["cma-puts"]),
    "get, ucp_get, cache": ({"lag": 0, "mode": "get", "fetch": "rows", "cache_bytes": 20000}, TRANSPORTS["cma-puts"]),
    "auto, ucp_get": ({"lag": 1, "mode": "auto"}, TRANSPORTS["cma-puts"]),
    "rows": ({"lag": 2, "fetch": "rows", "cache_bytes": 20000}, {}),
    "rows, cut, tcp": ({"lag": 1, "fetch": "rows", "request_bytes": 128, "response_bytes": 1024}, TRANSPORTS["tcp"]),
    "rows, each time": ({"lag": 0, "fetch": "rows", "dedupe": False, "pooling": "mean"}, {}),
    "auto": ({"lag": 2, "mode": "auto"}, {}),
    "a small share": ({"lag": 1, "serve_share": 0.2}, {}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_torchs_bits_in_every_mode(name: str, no_leftovers: None) -> None:
    settings, env = SETTINGS[name]
    results = run_ranks(exact, 3, 5, settings, 25, env=env)
    assert all(result.value["checked"] > 50 for result in results)
    peers = results[0].value["stats"]["peers"]
    wanted = "read" if "get" in name or "auto" in name else "put" if "tcp" in name or "puts" in name else "direct"
    assert [peer["path"] for peer in peers] == ["self", wanted, wanted]
    if wanted == "read":
        by = "ucp_get (posix/memory,cma/memory)" if "ucp_get" in name else "cma" if "cma" in name else "mapped"
        assert peers[1]["transport"] == by


@pytest.mark.parametrize("seed", range(3))
def test_random_placements(seed: int) -> None:
    """With ranks that own nothing, tables of one row, and every mode on the same asks."""
    settings = [{"lag": seed}, {"lag": seed, "mode": "get"}, {"lag": 1, "request_bytes": 200, "response_bytes": 1100}]
    for number, each in enumerate(settings):
        run_ranks(exact, 2 + seed, 100 + seed, {"name": f"l{number}", **each}, 20)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_many_random_placements(seed: int) -> None:
    name = list(SETTINGS)[seed % len(SETTINGS)]
    settings, env = SETTINGS[name]
    run_ranks(exact, 1 + seed % 5, 1000 + seed, settings, 60, env=env)


def kept(rank: int, world: int, store: Any, settings: dict[str, Any]) -> dict[str, int]:
    """Rank 0 owns a table; rank 1 keeps its hot rows, caches others, and asks for them again and again."""
    table = rows(1, 300, 64, "fp16")
    rng = np.random.default_rng(3)
    with Lookup({0: table} if rank == 0 else {}, store, rank, world, lag=2, fetch="rows", **settings) as lookup:
        if rank == 0:
            return {}
        lookup.keep(0, hot_rows(np.repeat(np.arange(300), np.arange(300)), 40))
        lookup.keep(0, np.array([299, 3, 3]))
        with pytest.raises(BagsError):
            lookup.keep(0, np.array([300]))
        for _ in range(60):
            bags = draw(rng, 0, 300, 20, 8)
            assert same_bits(lookup.ask([bags]).wait()[0], pooled(table, bags))
        hot = Bags(0, torch.arange(260, 300), torch.tensor([0, 7, 40]))
        before = lookup.stats()["peers"][0]["asked"]["requests"]
        assert same_bits(lookup.ask([hot]).wait()[0], pooled(table, hot))
        asked = lookup.stats()["peers"][0]["asked"]
        assert asked["requests"] == before  # all of it was here
        assert asked["fetched"] + asked["kept"] + asked["cached"] + asked["repeated"] == asked["rows"]
        return dict(asked)


def test_what_is_kept_is_not_asked_for() -> None:
    plain = run_ranks(kept, 2, {"dedupe": False})[1].value
    assert plain["kept"] > 0
    assert plain["cached"] == plain["repeated"] == 0
    once = run_ranks(kept, 2, {})[1].value
    assert once["repeated"] > 0
    assert once["fetched"] + once["repeated"] == plain["fetched"]
    small, all_ = (run_ranks(kept, 2, {"cache_bytes": size})[1].value for size in (50 * 128, 300 * 128))
    assert 0 < small["cached"] < all_["cached"]
    assert all_["fetched"] == 259  # every other row once
    assert all_["response_bytes"] < small["response_bytes"] < once["response_bytes"]


def chosen(rank: int, world: int, store: Any) -> list[Any]:
    """In mode auto, told that one way costs more than the other: by the bags, by their rows, and as it was measured."""
    weight = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    with Lookup({0: weight, 1: weight} if rank == 0 else {}, store, rank, world, mode="auto") as lookup:
        if rank == 0:
            return []
        rng = np.random.default_rng(0)
        found = [lookup.stats()]
        short, long = Bags(1, torch.arange(8), torch.arange(9)), draw(rng, 1, 200, 10, 60)
        for costs in ((1, 1, 2, 2), (2, 2, 1, 1), (0, 3, 20, 1)):
            lookup._core.prefer(1, costs)
            for bags in (short, long):
                assert same_bits(lookup.ask([bags]).wait()[0], pooled(Rows(weight), bags))
            found.append(lookup.stats())
        return [(each["asks"], each["peers"][0]["asked"], each["peers"][0]["chosen"]) for each in found]


def test_auto_chooses_by_what_was_measured() -> None:
    found = run_ranks(chosen, 2)[1].value
    assert [asks for asks, _, _ in found] == [0, 2, 4, 6]
    assert [asked["requests"] for _, asked, _ in found] == [0, 0, 2, 3]
    assert [asked["read"] for _, asked, _ in found] == [0, 18, 18, 26]
    ((words, tables),) = found[0][2].items()
    assert tables == [0, 1]
    assert words.startswith(("read", "ask"))


def test_a_choice_in_words() -> None:
    said = [str(Choice(0, (), *costs)) for costs in ((1, 1, 2, 2), (2, 2, 1, 1), (0, 3, 20, 1), (20, 1, 0, 3))]
    assert said == ["read", "ask", "ask for bags of more than 10 rows, read others",
                    "ask for bags of less than 10 rows, read others"]  # fmt: skip


def cannot_get(rank: int, world: int, store: Any) -> str:
    with pytest.raises(ReadsUnavailable) as caught:
        Lookup({rank: torch.zeros(2, 4)}, store, rank, world, mode="get", timeout=20)
    return str(caught.value)


@pytest.mark.parametrize(("transport", "lane"), [("tcp-puts", "tcp/"), ("posix-puts", "posix/")])
def test_gets_that_ucx_would_emulate_are_refused(transport: str, lane: str) -> None:
    for result in run_ranks(cannot_get, 2, env=TRANSPORTS[transport]):
        words = f"can neither map nor read the tables of rank {1 - result.rank}, nor get them over {lane}"
        assert words in result.value
        assert result.value.endswith("use mode put, or auto")


def huge_bag(rank: int, world: int, store: Any) -> int:
    """A bag that is many times as large as a window, weighted, among small ones."""
    table = rows(1, 500, 64, "int8")
    rng = np.random.default_rng(0)
    with Lookup({4: table} if rank == 1 else {}, store, rank, world, request_bytes=512, pooling="mean") as lookup:
        for weighted in (False, True):
            indices = torch.from_numpy(rng.integers(0, 500, 5000))
            weights = torch.rand(5000) if weighted else None
            bags = Bags(4, indices, torch.tensor([0, 3, 4800, 4800, 5000]), weights)
            (found,) = lookup.ask([bags]).wait()
            assert same_bits(found, pooled(table, bags, True))
        return int(lookup.stats()["peers"][1]["asked"]["requests"])


def test_a_bag_larger_than_a_window_is_one_sum() -> None:
    results = run_ranks(huge_bag, 2)
    assert results[0].value > 80


def slices(rank: int, world: int, store: Any) -> None:
    """Offsets need neither begin at 0 nor end at the last index; numpy goes in and comes out."""
    weight = np.random.default_rng(1).standard_normal((50, 8), np.float32)
    with Lookup({0: weight} if rank == 0 else {}, store, rank, world) as lookup:
        indices, offsets = np.arange(40) % 50, np.array([5, 5, 9, 20])
        (found,) = lookup.ask([Bags(0, indices, offsets)]).wait()
        assert isinstance(found, np.ndarray)
        assert (found[0] == 0).all()
        whole = Bags(0, torch.from_numpy(indices[5:20]), torch.from_numpy(offsets - 5))
        torch_found = pooled(Rows(torch.from_numpy(weight)), whole)
        assert same_bits(torch.from_numpy(found), torch_found)
        assert lookup.ask([]).wait() == []
        (nothing,) = lookup.ask([Bags(0, indices, offsets[:1])]).wait()
        assert nothing.shape == (0, 8)


def test_slices_and_numpy() -> None:
    run_ranks(slices, 2)


def one_array(rank: int, world: int, store: Any, mode: str) -> None:
    """All tables' rows into one array, plain or not; and of tables that are not alike, refused."""
    tables = {t: torch.randn(30, 16, generator=torch.Generator().manual_seed(t)) for t in range(5)}
    tables[9] = torch.zeros(5, 3)
    own = {t: weight for t, weight in tables.items() if t % world == rank}
    rng = np.random.default_rng(rank)
    with Lookup(own, store, rank, world, lag=1, mode=mode) as lookup:
        for order in ([0, 1, 2, 3, 4], [4, 2], [1, 1, 1]):
            bags = [draw(rng, t, 30, 7, 5) for t in order]
            wanted = torch.stack([pooled(Rows(tables[each.table]), each) for each in bags], dim=1)
            out = torch.full((7, len(order), 16), 7.0)
            assert lookup.ask(bags, out).wait() is out
            assert same_bits(out, wanted)
            strided = torch.full((7, len(order), 32), 7.0)[:, :, :16]
            assert same_bits(lookup.ask(bags, strided).wait(), wanted)
            array = np.empty((7, len(order), 16), np.float32)
            assert same_bits(torch.from_numpy(lookup.ask(bags, array).wait()), wanted)
        for wrong in (
            torch.empty(7, 2, 16),
            torch.empty(6, 3, 16),
            torch.empty(7, 3, 15),
            torch.empty(7, 3, 16).double(),
        ):
            with pytest.raises(BagsError):
                lookup.ask(bags, wrong)
        with pytest.raises(BagsError):
            lookup.ask([*bags[:2], draw(rng, 9, 5, 7, 5)], torch.empty(7, 3, 16))


@pytest.mark.parametrize("mode", ["put", "get"])
def test_one_array_for_all(mode: str) -> None:
    run_ranks(one_array, 2, mode)


def refused(rank: int, world: int, store: Any) -> list[str]:
    said = []
    table = {0: torch.zeros(10, 4)} if rank == 0 else {7: torch.zeros(10, 4)}
    with Lookup(table, store, rank, world) as lookup:
        i, o = torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3])
        bad: list[tuple[list[Bags], Any]] = [
            ([Bags(7, torch.tensor([1, 10]), torch.tensor([0, 2]))], None),
            ([Bags(0, i, o), Bags(7, torch.tensor([-1]), torch.tensor([0, 1]))], None),
            ([Bags(7, i, torch.tensor([0, 2, 1, 3]))], None),
            ([Bags(7, i, torch.tensor([0, 4]))], None),
            ([Bags(7, i, torch.tensor([-1, 3]))], None),
            ([Bags(7, i.int(), o)], None),
            ([Bags(7, i, o[:0])], None),
            ([Bags(7, i, o, torch.zeros(2))], None),
            ([Bags(3, i, o)], None),
            ([Bags(7, i, o)], [torch.empty(3, 4)]),
            ([Bags(7, i, o)], [torch.empty(4, 2).t()]),
            ([Bags(7, i, o)], []),
        ]
        for bags, out in bad:
            with pytest.raises(BagsError) as caught:
                lookup.ask(bags, out)
            said.append(str(caught.value))
        assert lookup.ask([Bags(7, i, o)]).wait()[0].shape == (2, 4)  # nothing has been harmed
        assert sum(peer["asked"]["requests"] for peer in lookup.stats()["peers"]) == (rank == 0)
    with pytest.raises(ExchangeClosed):
        lookup.ask([])
    return said


def test_bad_bags_are_refused_before_anything_is_asked() -> None:
    for result in run_ranks(refused, 2):
        assert result.value[0] == "table 7: index 10 at position 1 is not a row of a table of 10 rows"
        assert result.value[1] == "table 7: index -1 at position 0 is not a row of a table of 10 rows"
        assert "offset 1 at position 2" in result.value[2]
        assert result.value[8] == "table 3: no rank has it"


def start(rank: int, world: int, store: Any, tables: list[Any], settings: list[dict[str, Any]]) -> str:
    with pytest.raises((SettingsError, SettingsMismatch, RendezvousError, MemoryLimitExceeded)) as caught:
        Lookup(tables[rank], store, rank, world, timeout=20, **settings[rank])
    return str(caught.value)


@pytest.mark.parametrize(
    ("tables", "settings", "words"),
    [
        ([{0: torch.zeros(2, 4)}, {0: torch.zeros(2, 4)}], [{}, {}], "table 0 is at ranks 0 and 1"),
        ([{}, {}], [{"mode": "put"}, {"mode": "get"}], "mode is 'put' on rank 0; 'get' on rank 1"),
        ([{}, {}], [{"request_bytes": 100}, {}], "must be at least 128"),
        ([{}, {3: torch.zeros(5, 500)}], [{"response_bytes": 1999}] * 2, "2000 bytes"),
        ([{}, {3: torch.zeros(5000, 100)}], [{"mode": "get", "memory_limit": 1 << 20, "window_bytes": 1024}] * 2,
         "1.9 MiB of registered tables); memory_limit is 1.0 MiB"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_on_every_rank(tables: Any, settings: Any, words: str) -> None:
    said = [result.value for result in run_ranks(start, 2, tables, settings)]
    assert all(words in each for each in said), said


def uneven(rank: int, world: int, store: Any) -> float:
    """Rank 1 never asks; rank 2 asks late; rank 0 does not wait for either."""
    import time

    weight = torch.ones(10, 4)
    with Lookup({rank: weight}, store, rank, world, lag=1) as lookup:
        began = time.monotonic()
        if rank == 0:
            for _ in range(200):
                found = lookup.ask([Bags(1, torch.tensor([1, 2]), torch.tensor([0, 2]))]).wait()
                assert (found[0] == 2).all()
            store.set("done", "1")
        if rank == 2:
            store.get("done")  # it has not called anything until rank 0 has its rows
            assert (lookup.ask([Bags(0, torch.tensor([1]), torch.tensor([0, 1]))]).wait()[0] == 1).all()
        if rank == 1:
            store.get("done")
        return time.monotonic() - began


def test_ranks_need_not_ask_alike() -> None:
    run_ranks(uneven, 3)


def unfinished(rank: int, world: int, store: Any) -> str | None:
    lookup = Lookup({}, store, rank, world)
    if rank == 0:
        with pytest.raises(PeerTimeout) as caught:
            lookup.finish(timeout=0.2)
        store.set("told", "1")
        lookup.finish()
        lookup.close()
        return str(caught.value)
    store.get("told")
    lookup.finish()
    lookup.close()
    return None


def test_finish_names_who_still_asks() -> None:
    assert "have not finished: ranks 1" in run_ranks(unfinished, 2)[0].value


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (torch.zeros(5, dtype=torch.uint8), "must be a contiguous matrix"),
        (torch.zeros(5, 12, dtype=torch.uint8), "need a format"),
        (torch.zeros(5, 12).t(), "must be a contiguous matrix"),
        (torch.zeros(5, 12, dtype=torch.float64), "need a format"),
        (Rows(torch.zeros(5, 12, dtype=torch.uint8), "int8"), "quantised rows need it"),
        (Rows(torch.zeros(5, 12, dtype=torch.uint8), "int8", 5), "have 13 elements, not 12"),
        (Rows(torch.zeros(5, 12), "int8", 4), "int8 rows are uint8, not float32"),
    ],
)
def test_rows_that_cannot_be_served(rows: Any, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        describe(0, 0, rows)


def test_settings_that_cannot_be() -> None:
    for given, words in (
        ({"mode": "push"}, "must be one of put, get, auto"),
        ({"serve_share": 0}, "must be above 0"),
        ({"request_bytes": -1}, "must be an integer >= 0"),
        ({"lagg": 1}, "unknown setting: lagg"),
        ({"environment": {"BLSRDMA_LOOKUP_MODUS": "get"}}, "BLSRDMA_LOOKUP_MODUS"),
        ({"environment": {"BLSRDMA_LOOKUP_SERVE": "often"}}, "BLSRDMA_LOOKUP_SERVE = 'often': must be one of"),
    ):
        with pytest.raises(SettingsError, match=words):
            LookupSettings.resolve(**{"environment": {}, **given})
    settings = LookupSettings.resolve({"BLSRDMA_LOOKUP_MODE": "get", "BLSRDMA_LAG": "3"}, window_bytes=512)
    assert (settings.mode, settings.common.lag, settings.request_bytes) == ("get", 3, 512)
