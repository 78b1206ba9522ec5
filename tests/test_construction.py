"""Making an Exchange: what one rank gets wrong, every rank hears of, well before its deadline."""

from __future__ import annotations

import logging
import os
import time

import numpy as np
import pytest

from blsrdma import Exchange
from blsrdma.errors import MemoryLimitExceeded, RendezvousError, SettingsError, SettingsMismatch
from blsrdma.fabric import ucx_settings
from blsrdma.settings import format_size
from tests.patterns import TRANSPORTS
from tests.ranks import run_programs, run_ranks, store_server


def _construct(rank, world, store, per_rank):
    """Says how long it took, once all are there: Python and torch may take long to start on a busy machine."""
    store.add("here", 1)
    while store.add("here", 0) < world:
        time.sleep(0.001)
    started = time.monotonic()
    try:
        Exchange(store, rank, world, timeout=30, **per_rank[rank]).close()
    finally:
        store.set(f"took {rank}", str(time.monotonic() - started))


@pytest.mark.parametrize("culprit", [0, 2])
@pytest.mark.parametrize(
    ("bad", "kind", "message"),
    [
        ({"lag": -1}, SettingsError, "lag = -1: must be an integer >= 0"),
        (
            {"window_bytes": 1 << 20, "memory_limit": 1 << 20},
            MemoryLimitExceeded,
            "windows need 4.0 MiB per rank (2 sources x 2 windows of 1.0 MiB); memory_limit is 1.0 MiB",
        ),
    ],
)
def test_what_one_rank_refuses_ends_all(culprit: int, bad: dict[str, int], kind: type, message: str) -> None:
    store = store_server()
    settings = [bad if rank == culprit else {} for rank in range(3)]
    results = run_ranks(_construct, 3, settings, check=False, store=store)
    assert all(float(store.get(f"took {rank}")) < 10 for rank in range(3))
    for result in results:
        if result.rank == culprit:
            assert type(result.error.exception) is kind
            assert result.error.message == message
        else:
            assert isinstance(result.error.exception, RendezvousError)
            assert result.error.message == f"rank {culprit} failed: {kind.__name__}: {message}"


@pytest.mark.parametrize("transport", ["default", "tcp"])
def test_mismatched_lags(transport: str) -> None:
    settings = [{"lag": 1}, {"lag": 1}, {"lag": 2}]
    for result in run_ranks(_construct, 3, settings, env=TRANSPORTS[transport], check=False):
        assert isinstance(result.error.exception, SettingsMismatch)
        assert "lag is 1 on ranks 0, 1; 2 on rank 2" in result.error.message


def _from_torchruns_environment(rank, world, store):
    assert os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "True"
    with Exchange() as exchange:
        assert (exchange.rank, exchange.world_size, exchange.lag) == (rank, world, 2)
        with exchange.post(np.full(world, rank)) as received:
            assert [int(each[0]) for each in received] == list(range(world))


def test_everything_from_the_environment() -> None:
    run_ranks(_from_torchruns_environment, 2, env={"BLSRDMA_LAG": "2"})


def test_without_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SettingsError, match="RANK and WORLD_SIZE are not set"):
        Exchange()
    with pytest.raises(SettingsError, match="no store given, and none in the environment"):
        Exchange(rank=0, world_size=2)


def test_relaxed_ordering_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UCX_IB_PCI_RELAXED_ORDERING", "on")
    with pytest.raises(SettingsError, match="a counter could become visible before its message"):
        ucx_settings()


def test_users_ucx_settings_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UCX_IB_PCI_RELAXED_ORDERING", raising=False)
    monkeypatch.setenv("UCX_POSIX_ERROR_HANDLING", "n")
    monkeypatch.setenv("UCX_RNDV_THRESH", "8192")  # what importing ucxx leaves there: not the user's
    assert ucx_settings() == {"RNDV_THRESH": "inf", "SYSV_ERROR_HANDLING": "y"}


def _memory(rank, world, store):
    records = []
    logger = logging.getLogger("blsrdma")
    logger.setLevel(logging.INFO)
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger.addHandler(handler)
    with Exchange(store, rank, world, lag=3, window_bytes=1000) as exchange:
        expected = 2 * 64 + world * 512 + (world - 1) * 8 * (64 + 1024) + world * (1024 + 8 * (64 + 512))
        assert exchange.memory_bytes == expected == exchange.stats()["memory_bytes"] == exchange._arena.size
    reached = "exchange 'exchange': rank {rank} reaches 2 by direct stores"
    assert reached.format(rank=rank) in records, records
    said = f"lag 3, 8 windows of 1000 B from each of 2 sources: {format_size(expected)} registered"
    assert any(said in text for text in records), records


def test_memory_is_computed_and_said() -> None:
    run_ranks(_memory, 3)


def _one_copy(rank, world, store):
    from blsrdma.ucx import native

    used, loaded = native.loaded_ucp()
    assert loaded == [used]
    with Exchange(store, rank, world):
        pass


def test_one_copy_of_ucx() -> None:
    run_ranks(_one_copy, 1)


NOT_CLOSED = """
import sys, numpy as np
from blsrdma import Exchange
exchange = Exchange(timeout=30)
with exchange.post(np.zeros(2)):
    pass
if exchange.rank == 1:
    exchange.post(np.zeros(2)).wait()
"""


@pytest.mark.parametrize("transport", ["default", "tcp"])
def test_interpreter_exit_without_close(transport: str) -> None:
    """The rank that just ends says so to its peers, in its own process and in theirs; nobody crashes."""
    ended = run_programs(NOT_CLOSED, 2, TRANSPORTS[transport])
    assert [each.status for each in ended] == [0, 1], ended
    assert ended[0].err == "exchange 'exchange' was not closed before the interpreter ended\n"
    assert "iteration 1: rank 0 failed: BlsrdmaError: the interpreter ended without close()" in ended[1].err
