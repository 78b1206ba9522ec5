"""Many groups: tables are sharded in a group of ranks, groups are replicas of each other, and a group that fails does
not touch the others. Every rank is also in an exchange across the groups, with the ranks that hold the same shard."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

from blsrdma import Exchange
from blsrdma.errors import PeerFailed
from tests.patterns import message, messages
from tests.ranks import run_ranks

GROUPS, SHARDS = 3, 2


def _serve(exchange, first, rounds, salt):
    """Iterations `first` .. `first + rounds - 1`, each message checked; `salt` tells the groups' messages apart."""
    for i in range(first, first + rounds):
        exchange.begin()
        sizes = [(salt + exchange.rank + q + i) % 300 for q in range(exchange.world_size)]
        with exchange.post(messages(salt + exchange.rank, i, sizes), sizes) as received:
            for q in range(exchange.world_size):
                expected = message(salt + q, exchange.rank, i, (salt + q + exchange.rank + i) % 300)
                np.testing.assert_array_equal(received[q], expected)


def _rank(rank, world, store):
    group, shard = divmod(rank, SHARDS)
    ours = Exchange(store, shard, SHARDS, name=f"group{group}", lag=1, window_bytes=256, timeout=40)
    across = Exchange(store, group, GROUPS, name=f"shard{shard}", window_bytes=256, timeout=40)
    _serve(ours, 0, 50, 100 * group)
    _serve(across, 0, 5, 1000 + 100 * shard)
    store.add("served", 1)
    while store.add("served", 0) < world:
        time.sleep(0.001)
    if rank == 2 * SHARDS - 1:  # the last one of group 1
        os.kill(os.getpid(), signal.SIGKILL)
    if group == 1:
        with pytest.raises(PeerFailed, match="rank 1 died") as failure:
            _serve(ours, 50, 1_000_000, 100 * group)
        ours.close(failure.value)
        across.close(failure.value)  # so that those who hold its shard hear at once
        store.set("dead", "group 1")
        return "lost its group"
    store.wait(["dead"])
    _serve(ours, 50, 200, 100 * group)  # as if nothing had happened
    with pytest.raises(PeerFailed) as elsewhere:  # what spans the groups is what ends
        _serve(across, 5, 1_000_000, 1000 + 100 * shard)
    across.close(elsewhere.value)
    # The replicas that are left find together again, without touching what they serve.
    left = [g for g in range(GROUPS) if g != 1]
    with Exchange(
        store, left.index(group), len(left), name=f"shard{shard} again", window_bytes=256, timeout=40
    ) as again:
        _serve(again, 0, 5, 0)
        _serve(ours, 250, 50, 100 * group)
    ours.close()
    return "serves"


def test_a_group_that_fails_does_not_touch_the_others(no_leftovers: None) -> None:
    results = run_ranks(_rank, GROUPS * SHARDS, expect_exit={2 * SHARDS - 1: -signal.SIGKILL}, timeout=90)
    said = [result.value for result in results]
    assert said == ["serves", "serves", "lost its group", None, "serves", "serves"]
