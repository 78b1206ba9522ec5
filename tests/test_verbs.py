"""The exchange, and lookups, over RDMA alone: on a machine that has a device, and in the guest of ci/softroce/run.

Direct stores and shared memory are off; UCX_TLS, UCX_NET_DEVICES and the like may be set by whoever knows the device.
"""

from __future__ import annotations

import os
import signal

import pytest

from tests.lookup.test_lookup import exact
from tests.ranks import run_ranks
from tests.test_exchange import _every_transport
from tests.test_large_messages import _any_size

VERBS = {"UCX_TLS": os.environ.get("UCX_TLS", "rc,ud,self"), "BLSRDMA_DIRECT": "0"}
SECONDS = 200.0  # emulated, everything takes long

pytestmark = pytest.mark.rdma


@pytest.mark.parametrize("lag", [0, 2])
def test_irregular_messages(lag: int, no_leftovers: None) -> None:
    for result in run_ranks(_every_transport, 3, lag, "put", env=VERBS, timeout=SECONDS):
        assert all(name.startswith(("rc_", "dc_")) for q, name in enumerate(result.value) if q != result.rank), result


@pytest.mark.parametrize("with_out", [False, True], ids=["views", "out"])
def test_large_messages_are_pulled(with_out: bool, no_leftovers: None) -> None:
    run_ranks(_any_size, 3, 1, 1000, with_out, env=VERBS, timeout=SECONDS)


def test_tables_are_read(no_leftovers: None) -> None:
    results = run_ranks(exact, 3, 21, {"lag": 2, "mode": "get", "timeout": 100}, 5, env=VERBS, timeout=SECONDS)
    for result in results:
        paths = {(peer["path"], peer["transport"].startswith(("ucp_get (rc_", "ucp_get (dc_")))
                 for peer in result.value["stats"]["peers"] if peer["rank"] != result.rank}  # fmt: skip
        assert paths == {("read", True)}, result


def _killed(rank, world, store):
    import numpy as np

    from blsrdma import Exchange
    from blsrdma.errors import PeerFailed

    exchange = Exchange(store, rank, world, lag=1, window_bytes=4096, timeout=60, keepalive=10)
    for _ in range(3):
        with exchange.post(np.zeros(world * 512)):
            pass
    store.add("ready", 1)
    while store.add("ready", 0) < world:
        pass
    if rank == 1:
        exchange.post(np.zeros(world * 512))
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerFailed, match="rank 1") as failure:
        while True:
            with exchange.post(np.zeros(world * 512)):
                pass
    exchange.close(failure.value)


def test_a_kill_is_noticed(no_leftovers: None) -> None:
    run_ranks(_killed, 3, env=VERBS, expect_exit={1: -signal.SIGKILL}, timeout=SECONDS)
