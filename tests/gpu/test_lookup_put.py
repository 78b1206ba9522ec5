"""Lookup, mode put, of tables in GPU memory on the simulated driver: the bits of tables in CPU memory; and a GPU that
hangs or fails is told to whoever asks, within bounds."""

from __future__ import annotations

import re
import time
from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from blsrdma.errors import (
    BlsrdmaError,
    CompileError,
    GpuError,
    MemoryLimitExceeded,
    PeerFailed,
    PeerTimeout,
    SettingsError,
    VersionError,
)
from blsrdma.gpu import compiler, tables
from blsrdma.gpu.arrays import GpuArray
from blsrdma.gpu.device import open_device
from blsrdma.lookup import Lookup
from blsrdma.lookup_tables import Bags, Rows
from tests.gpu import simulated
from tests.gpu.memory import OnDevice
from tests.gpu.rank import start
from tests.lookup.bags import DIMS, FORMATS, draw, pooled, rows, same_bits
from tests.patterns import TRANSPORTS
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed import Store

TABLES, COUNT = 9, 60
DELAYED = {"SIMULATED_CUDA_DELAY_US": "60"}


@pytest.fixture(autouse=True, scope="module")
def _built() -> Iterator[None]:
    """What ranks compile is compiled before they wait for one another."""
    simulated.driver()
    simulated.image(tables.SOURCE)
    yield


def table(number: int, version: int = 0) -> Rows:
    """The same on every rank."""
    format_ = FORMATS[number % 4]
    dim = DIMS[number % len(DIMS)] * (2 if format_ == "int4" else 1)
    return rows(1000 * version + number, COUNT, dim, format_)


def place(on: OnDevice, given: Rows) -> Rows:
    """In GPU memory, as any library's arrays are."""
    assert isinstance(given.data, torch.Tensor)
    data = given.data.numpy()
    return Rows(GpuArray(on.put(data), data.shape, data.dtype), given.format, given.dim)


def own(on: OnDevice, rank: int, world: int, version: int = 0) -> dict[int, Rows]:
    """Tables of a rank: rank 0 has all in CPU memory, rank 1 all on its GPU, the others some."""
    mine = {t: table(t, version) for t in range(rank, TABLES, world)}
    return {t: place(on, each) if rank == 1 or (rank > 1 and t % 2) else each for t, each in mine.items()}


def meet(store: Store, word: str, world: int, rank: int) -> None:
    store.set(f"{word}/{rank}", "")
    store.wait([f"{word}/{q}" for q in range(world)])


def at_rest() -> None:
    """All that was taken is given back, and nothing was found that a real driver need not notice."""
    assert simulated.complaints() == 0
    assert simulated.live("pinned") == 0


def _exact(rank: int, world: int, store: Store, asks: int, settings: dict[str, Any]) -> dict[str, Any]:
    start()
    on = OnDevice(open_device(0))
    rng = np.random.default_rng(rank)
    mean = settings.get("pooling") == "mean"
    with Lookup(own(on, rank, world), store, rank, world, **settings) as lookup:
        going: deque[tuple[Any, list[Bags]]] = deque()

        def check() -> None:
            asked, bags = going.popleft()
            for each, got in zip(bags, asked.wait(), strict=True):
                assert same_bits(got, pooled(table(each.table), each, mean)), each.table

        for _ in range(asks):
            some = [int(t) for t in rng.permutation(TABLES)[: int(rng.integers(1, TABLES))]]
            going.append(
                (lookup.ask(bags := [draw(rng, t, COUNT, int(rng.integers(0, 9)), int(rng.choice([1, 5, 90])))
                                     for t in some]), bags)
            )  # fmt: skip
            while len(going) > lookup.lag:
                check()
        while going:
            check()
        stats = lookup.stats()
    at_rest()
    on.close()
    return stats


CASES: dict[str, dict[str, Any]] = {
    "plain": {"lag": 2},
    "cut": {"lag": 1, "request_bytes": 256, "response_bytes": 1100, "pooling": "mean"},
    "rows": {"lag": 2, "fetch": "rows", "request_bytes": 1000},
}


@pytest.mark.parametrize("name", CASES)
def test_exact(where: dict[str, str], name: str) -> None:
    results = run_ranks(_exact, 3, 15, CASES[name], env=DELAYED | where)
    for result in results:
        there = [peer["gpu_tables"] for peer in result.value["peers"]]
        assert there == [0, len(range(1, TABLES, 3)), sum(t % 2 for t in range(2, TABLES, 3))]
    assert all(results[0].value["peers"][q]["asked"]["requests"] > 5 for q in (1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("name", CASES)
def test_exact_at_length(name: str, ranks: int) -> None:
    run_ranks(_exact, ranks, 200, CASES[name], env={"SIMULATED_CUDA_DELAY_US": "300"}, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["tcp", "cma-puts"])
@pytest.mark.parametrize("name", CASES)
def test_exact_by_puts(name: str, transport: str) -> None:
    run_ranks(_exact, 3, 50, CASES[name], env=DELAYED | TRANSPORTS[transport])


def _versions(rank: int, world: int, store: Store) -> list[int]:
    start()
    on = OnDevice(open_device(0))
    rng = np.random.default_rng(rank)
    versions = [1, 2, 5, 9]
    seen = []
    with Lookup(own(on, rank, world, 1), store, rank, world, lag=1, version=1) as lookup:
        coming = deque(versions[1:])
        while not seen or seen[-1] != versions[-1]:
            if coming and rng.random() < 0.2:
                lookup.load_tables(coming[0], own(on, rank, world, coming[0]))
                coming.popleft()
            asked = lookup.ask(bags := [draw(rng, t, COUNT, 3, 5) for t in range(TABLES)])
            for each, got in zip(bags, asked.wait(), strict=True):
                assert same_bits(got, pooled(table(each.table, asked.version), each)), (asked.version, each.table)
            seen.append(asked.version)
    at_rest()
    on.close()
    return seen


def test_versions(where: dict[str, str]) -> None:
    for result in run_ranks(_versions, 3, env=DELAYED | where):
        assert result.value == sorted(result.value)


def _wrong_versions(rank: int, world: int, store: Store) -> list[str]:
    start()
    on = OnDevice(open_device(0))
    said = []
    with Lookup({0: place(on, table(0))}, store, rank, world) as lookup:
        stream = on.device.stream()
        late = place(on, table(0))
        assert isinstance(late.data, GpuArray)

        class Late:
            """Rows that a stream writes."""

            __cuda_array_interface__ = late.data.__cuda_array_interface__ | {"stream": stream.address}

        for bad in ({0: table(0)}, {0: place(on, table(4))}):
            with pytest.raises(VersionError) as caught:
                lookup.load_tables(1, bad)
            said.append(str(caught.value))
        with simulated.hold():
            on.device.fill(late.data.address, 0, 16, stream.address)
            with pytest.raises(GpuError, match="not complete after 0.1 s"):
                lookup.load_tables(1, {0: Rows(Late())}, timeout=0.1)  # type: ignore[arg-type]
        lookup.load_tables(1, {0: Rows(Late())})  # type: ignore[arg-type]
        (got,) = lookup.ask([Bags(0, torch.tensor([0]), torch.tensor([0, 1]))]).wait()
        assert got[0, 0] == 0.0
    on.close()
    return said


def test_wrong_versions() -> None:
    (result,) = run_ranks(_wrong_versions, 1)
    first = "where its first version has 60 x 1 fp32 on a GPU"
    assert result.value == [f"table 0: 60 x 1 fp32 rows, {first}", f"table 0: 60 x 64 fp32 rows on a GPU, {first}"]


# --- a GPU that hangs, or fails


def ones(on: OnDevice, dim: int = 8) -> dict[int, Rows]:
    return {1: place(on, Rows(torch.ones(4, dim)))}


def one(number: int) -> list[Bags]:
    return [Bags(number, torch.tensor([1, 2]), torch.tensor([0, 2]))]


def _owner_fails(rank: int, world: int, store: Store, how: str) -> list[str]:
    """Rank 1's GPU fails, or hangs, when all have had an answer and other tables; rank 2 takes default rows."""
    start()
    on = OnDevice(open_device(0))
    mine = ones(on) if rank == 1 else {rank: Rows(torch.ones(4, 8))}
    degrade = "degrade" if rank == 2 else "raise"
    lookup = Lookup(mine, store, rank, world, lag=1, on_peer_failure=degrade, default_row=7.0, close_timeout=1.0)
    assert (lookup.ask(one(1)).wait()[0] == 2.0).all()
    newest = ones(on)
    lookup.load_tables(1, ones(on) if rank == 1 else mine)
    meet(store, "answered", world, rank)
    if rank == 1:
        for each in lookup._own.gpu.poolers:  # type: ignore[union-attr]
            each.patience_ns = 300_000_000
        if how == "hangs":
            simulated.control().simulated_hold(1)
        else:
            simulated.fail("kernel", 700)
    meet(store, "broken", world, rank)
    said: list[str] = []
    for _ in range(2):
        asked = lookup.ask([*one(1), *one(0)])
        if rank == 2:
            assert [(got == value).all() for got, value in zip(asked.wait(), (7.0, 2.0), strict=True)] == [True, True]
            continue
        with pytest.raises(GpuError if rank == 1 else PeerFailed) as caught:
            asked.wait()
        assert rank == 1 or caught.value.rank == 1
        said.append(str(caught.value))
        assert (lookup.ask(one(0)).wait()[0] == 2.0).all()
    if rank == 1:
        with pytest.raises(GpuError, match="GPU 0 pools no rows any more"):
            lookup.load_tables(2, newest)
    meet(store, "told", world, rank)
    assert (lookup.ask(one(2)).wait()[0] == 2.0).all()  # others serve it on
    assert lookup.version == 1
    assert rank != 1 or lookup._outgoing is not None  # nobody needs the version before, but the GPU may still read it
    meet(store, "kept", world, rank)
    if rank == 2:
        assert lookup.stats()["peers"][1]["asked"]["degraded"] == 2
    began = time.monotonic()
    lookup.close()
    assert time.monotonic() - began < 6.0
    assert simulated.complaints() == 0
    simulated.control().simulated_hold(0)
    return said


@pytest.mark.parametrize("how", ["hangs", "fails"])
def test_an_owner_whose_gpu_fails(how: str) -> None:
    client, owner, _ = run_ranks(_owner_fails, 3, how)
    if how == "hangs":
        their, mine = r"its GPU has not pooled its rows within \d+ ms", "it was not done within"
    else:
        their, mine = "its GPU has failed, with CUDA's error 700", "CUDA_ERROR_ILLEGAL_ADDRESS"
    for ask, said in zip((1, 3), client.value, strict=True):
        assert re.fullmatch(f"lookup 'lookup', ask {ask}: rank 1 failed: {their}", said)
    assert all("this rank's GPU did not pool its own tables: " in said and mine in said for said in owner.value)


def _hangs_for_long(rank: int, world: int, store: Store) -> float:
    """A client's deadline comes before the owner's patience ends; and the owner closes while its server waits."""
    start()
    on = OnDevice(open_device(0))
    lookup = Lookup(ones(on) if rank else {}, store, rank, world, timeout=50.0, close_timeout=0.4)
    newer = ones(on), ones(on)
    meet(store, "open", world, rank)
    if rank:
        simulated.control().simulated_hold(1)
        meet(store, "held", world, rank)
    else:
        meet(store, "held", world, rank)
        with pytest.raises(PeerTimeout, match="not answered by: rank 1"):
            lookup.ask(one(1)).wait(timeout=0.2)
    meet(store, "asked", world, rank)
    if rank:
        lookup.load_tables(1, newer[0])
        store.wait(["left"])
        with pytest.raises(PeerTimeout, match="version 2 .* yet; .*: this rank's server, which waits for its GPU"):
            lookup.load_tables(2, newer[1], timeout=0.2)
    began = time.monotonic()
    lookup.close()
    store.set("left", "")
    took = time.monotonic() - began
    simulated.control().simulated_hold(0)
    return took


def test_a_gpu_that_hangs_for_long() -> None:
    results = run_ranks(_hangs_for_long, 2)
    assert all(result.value < 8.0 for result in results)


# --- starts


REFUSED: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "get": (SettingsError, {"mode": "get"}, "mode = get: table 0 is in GPU memory, .* blsrdma.gpu.lookup.GpuLookup"),
    "auto": (SettingsError, {"mode": "auto"}, "mode = auto: table 0 is in GPU memory"),
    "inline": (SettingsError, {"serve": "inline"}, "serve = inline: table 0 is in GPU memory"),
    "apart": (SettingsError, {}, r"tables \[0, 1\] are on GPUs \[0, 1\]: a rank's tables lie on one GPU"),
    "strided": (SettingsError, {}, r"table 0: rows must be a contiguous matrix, not of strides \(64, 4\)"),
    "host": (SettingsError, {}, "table 0: 0x[0-9a-f]+ is no address of GPU memory"),
    "bytes": (SettingsError, {}, "table 0: rows of uint8 need a format"),
    "memory": (MemoryLimitExceeded, {"memory_limit": 20000}, "21.8 KiB page-locked for a GPU"),
    "no compiler": (CompileError, {}, "no compiler for GPU kernels"),
}


class Strided:
    """Every eighth row of a matrix."""

    def __init__(self, address: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (4, 8), "typestr": "<f4", "data": (address, False), "strides": (64, 4), "version": 3,
        }  # fmt: skip


def _no_compiler(*_: object) -> compiler.Compiled:
    raise CompileError("no compiler for GPU kernels", "")


def _refused(rank: int, world: int, store: Store) -> None:
    start()
    on, other = OnDevice(open_device(0)), OnDevice(open_device(1))
    host = np.ones((4, 8), np.float32)
    odd: dict[str, dict[int, Any]] = {
        "apart": {0: place(on, table(0)), 1: place(other, table(1))},
        "strided": {0: Strided(on.room(512))},
        "host": {0: GpuArray(host.ctypes.data, (4, 8), host.dtype)},
        "bytes": {0: GpuArray(on.room(128), (4, 32), np.dtype(np.uint8))},
    }
    for case, (kind, settings, text) in REFUSED.items():
        if case == "no compiler":
            compiler.build = _no_compiler
        tables_ = odd.get(case, {0: place(on, table(0))})
        small = {"request_bytes": 2000, "response_bytes": 5000} | settings
        with pytest.raises(kind, match=text):
            Lookup(tables_, store, rank, world, name=case, **small)
    at_rest()


def test_refused() -> None:
    run_ranks(_refused, 1, env={"SIMULATED_CUDA_DEVICES": "2"})


def _without_a_compiler(rank: int, world: int, store: Store) -> str:
    start()
    compiler.build = _no_compiler
    on = OnDevice(open_device(0))
    try:
        Lookup(ones(on) if rank else {}, store, rank, world, timeout=20.0).close()
    except BlsrdmaError as error:
        return type(error).__name__
    return ""


def test_all_hear_of_a_bad_start() -> None:
    others, owner = run_ranks(_without_a_compiler, 2)
    assert (others.value, owner.value) == ("RendezvousError", "CompileError")


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    """Of CUDA tensors."""
    for result in run_ranks(_cuda_tensors, 2, timeout=120.0):
        assert result.value == [0, TABLES // 2]


def _cuda_tensors(rank: int, world: int, store: Store) -> list[int]:
    rng = np.random.default_rng(rank)
    mine = {t: table(t) for t in range(rank, TABLES, world)}
    if rank == 1:
        mine = {t: Rows(each.data.cuda(), each.format, each.dim) for t, each in mine.items()}  # type: ignore[union-attr]
    with Lookup(mine, store, rank, world, lag=2, request_bytes=2000, response_bytes=5000) as lookup:
        for _ in range(100):
            asked = lookup.ask(bags := [draw(rng, t, COUNT, 6, 30) for t in range(TABLES)])
            for each, got in zip(bags, asked.wait(), strict=True):
                assert same_bits(got, pooled(table(each.table), each)), each.table
        return [peer["gpu_tables"] for peer in lookup.stats()["peers"]]
