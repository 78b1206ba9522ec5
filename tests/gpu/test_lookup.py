"""GpuLookup on the simulated driver: rows read out of others' memory give the CPU's bits."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch

from blsrdma.errors import (
    BagsError,
    ExchangeClosed,
    MemoryLimitExceeded,
    PeerFailed,
    ReadsUnavailable,
    RendezvousError,
    SettingsError,
)
from blsrdma.gpu.device import open_device
from blsrdma.gpu.lookup import GpuLookup
from blsrdma.gpu.pooling import GpuBags
from tests.gpu import simulated
from tests.gpu.memory import OnDevice
from tests.gpu.rank import start
from tests.lookup.bags import draw, pooled, rows, same_bits
from tests.ranks import run_ranks

DIM, ROWS, SAMPLES = 20, 50, 13


def together(on, bags):
    """Bags of several tables, one list after another."""
    firsts = np.cumsum([0, *(len(each.indices) for each in bags)])
    offsets = [np.asarray(each.offsets)[:-1] + first for each, first in zip(bags, firsts[:-1], strict=True)]
    indices = np.concatenate([np.asarray(each.indices) for each in bags])
    where = on.put(np.concatenate([*offsets, firsts[-1:]]))
    weights = 0 if bags[0].weights is None else on.put(np.concatenate([np.asarray(each.weights) for each in bags]))
    return GpuBags(SAMPLES, on.put(indices), len(indices), where, SAMPLES, weights=weights)


def _exact(rank, world, store, format_, mean):
    start()
    owned = {table: rows(table, ROWS, DIM, format_) for table in range(2 * world) if table // 2 == rank}
    rng = np.random.default_rng(rank)
    with GpuLookup(owned, store, rank, world, device=0, mean=mean) as lookup:
        assert [each.table for each in lookup.tables] == list(range(2 * world))
        on = OnDevice(open_device(0))
        stream = on.device.stream()
        for turn in range(6):
            asked = [int(each) for each in rng.permutation(2 * world)[: 1 + turn % 3]]
            bags = [draw(rng, table, ROWS, SAMPLES, 5, bool(turn % 2)) for table in asked]
            out = on.room(4 * SAMPLES * len(asked) * DIM)
            number = lookup.pool(asked, together(on, bags), out, stream=stream)
            lookup.check(asked, number)
            got = on.floats(out, SAMPLES, len(asked), DIM)
            for position, (table, each) in enumerate(zip(asked, bags, strict=True)):
                assert same_bits(got[:, position], pooled(rows(table, ROWS, DIM, format_), each, mean))
        store.set(f"done/{rank}", "")
        store.wait([f"done/{q}" for q in range(world)])
        on.close()
    assert simulated.complaints() == 0
    assert simulated.live("imported") == 0
    with pytest.raises(ExchangeClosed):
        lookup.pool([0], GpuBags(0, 0, 0, 0, 0), 0)


@pytest.mark.parametrize(("format_", "mean"), [("fp32", False), ("fp32", True), ("fp16", False), ("int8", False)])
def test_exact(where, format_, mean):
    run_ranks(_exact, 3, format_, mean, env={"SIMULATED_CUDA_DELAY_US": "100", **where})


def _refusals(rank, world, store):
    start()
    owned = {rank: rows(rank, ROWS, DIM, "fp32"), 10 + rank: rows(10 + rank, ROWS, 8, "fp32")}
    with GpuLookup(owned, store, rank, world, device=0) as lookup:
        on = OnDevice(open_device(0))
        out = on.room(4 * SAMPLES * DIM)
        bags = draw(np.random.default_rng(1), 0, ROWS, SAMPLES, 5, False)
        with pytest.raises(BagsError, match="table 7: no rank has it"):
            lookup.pool([7], together(on, [bags]), out)
        with pytest.raises(BagsError, match=r"tables \[0, 10\] are not of one dim and row format"):
            lookup.pool([0, 10], together(on, [bags, bags]), out)
        bags.indices[3] = ROWS
        number = lookup.pool([1], together(on, [bags]), out)
        with pytest.raises(BagsError, match=f"table 1: index {ROWS} at position 3") as info:
            lookup.check([1], number)
        assert (info.value.table, info.value.position, info.value.value) == (1, 3, ROWS)
        store.set(f"done/{rank}", "")
        store.wait([f"done/{q}" for q in range(world)])
        on.close()


def test_refusals(where):
    run_ranks(_refusals, 2, env=where)


def _start(rank, world, store, tables, settings):
    start()
    try:
        GpuLookup(tables[rank], store, rank, world, **settings).close()
    except Exception as error:
        return type(error), str(error)
    return None, ""


def test_bad_starts():
    def starts(*tables, env=None, **settings):
        settings = {"timeout": 20.0} | settings
        return [result.value for result in run_ranks(_start, 2, tables, settings, env=env)]

    small = np.ones((4, 8), np.float32)
    for kind, text in starts({3: small}, {3: small}):
        assert kind is SettingsError
        assert text == "table 3 is at ranks 0 and 1"
    good, bad = starts({0: small}, {1: small[0]}, device=0)
    assert bad[0] is SettingsError
    assert good[0] is RendezvousError
    large = np.ones((1 << 12, 64), np.float32)
    good, bad = starts({0: small}, {1: large}, env={"SIMULATED_CUDA_MEMORY": "500000"}, device=0)
    assert bad[0] is MemoryLimitExceeded
    assert "tables need 1.0 MiB of GPU 0" in bad[1]
    assert good[0] is RendezvousError
    apart = {"SIMULATED_CUDA_DEVICES": "2", "SIMULATED_CUDA_PEERS": "0"}
    for kind, text in starts({0: small}, {1: small}, env=apart):
        assert kind is ReadsUnavailable
        assert "GPU memory cannot be read by rank" in text
    assert starts({0: small}, {}) == [(None, ""), (None, "")]


def _dies(rank, world, store):
    start()
    lookup = GpuLookup({rank: torch.ones(4, 8)}, store, rank, world, device=0, close_timeout=1.0)
    store.set(f"there/{rank}", "")
    store.wait([f"there/{q}" for q in range(world)])
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    on = OnDevice(open_device(0))
    out = on.room(4 * 8)
    bags = GpuBags(1, on.put(np.zeros(1, np.int64)), 1, on.put(np.array([0, 1])), 1)
    with pytest.raises(PeerFailed, match="rank 1 died"):
        while True:  # it is heard of apart from any call
            lookup.check([0], lookup.pool([0], bags, out))
    lookup.close()


def test_an_owner_that_dies():
    run_ranks(_dies, 3, expect_exit={1: -signal.SIGKILL})
