"""`python -m blsrdma check`: what it tries, that it sees what is wrong, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from blsrdma import Exchange
from blsrdma.check import order, probe, rounds
from blsrdma.links import findings, status
from tests.patterns import TRANSPORTS
from tests.ranks import run_ranks


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 8, 33])
@pytest.mark.parametrize("one_by_one", [False, True])
def test_rounds_hold_every_pair_once(ranks: int, one_by_one: bool) -> None:
    every = list(rounds(ranks, one_by_one))
    assert sorted(pair for each in every for pair in each) == [
        (a, b) for a in range(ranks) for b in range(a + 1, ranks)
    ]
    for each in every:
        members = [rank for pair in each for rank in pair]
        assert len(members) == len(set(members))
    if not one_by_one:
        assert len(every) == ranks - 1 + ranks % 2


def _probe(rank, world, store, one_by_one):
    return probe(store, rank, world, 1 << 17, 30.0, one_by_one)


@pytest.mark.parametrize(("transport", "one_by_one"), [("default", False), ("tcp", True)])
def test_what_each_rank_finds_out(transport: str, one_by_one: bool, no_leftovers: None) -> None:
    for result in run_ranks(_probe, 3, one_by_one, env=TRANSPORTS[transport]):
        facts, others = result.value, {0, 1, 2} - {result.rank}
        assert not facts.error
        assert not facts.failed
        assert not facts.torn
        assert facts.verified == 400
        assert set(facts.path) == set(facts.latency) == set(facts.bandwidth) == others
        assert set(facts.path.values()) == {"put" if transport == "tcp" else "direct"}
        assert all(("tcp" if transport == "tcp" else "mapped") in name for name in facts.transport.values())
        assert all(0 < value < 1e7 for value in facts.latency.values())
        assert all(1e3 < value < 1e12 for value in facts.bandwidth.values())


def _one_byte_is_late(rank, world, store):
    with Exchange(store, rank, world, lag=2, window_bytes=4096) as exchange:
        if rank == 1:
            post = exchange.post

            def lying(send, counts):
                if exchange.iteration == 20 and counts[0]:
                    send[counts[0] - 1] ^= 1  # the last one of the message to rank 0
                return post(send, counts)

            exchange.post = lying
        return order(exchange, 40)


def test_a_message_that_is_not_whole_is_seen() -> None:
    found = [result.value for result in run_ranks(_one_byte_is_late, 3)]
    assert [len(torn) for _, torn in found] == [1, 0, 0]
    assert found[0][1][0].startswith("message 20 of rank 1 (")


def _only_pairs_fail(rank, world, store):
    """Rank 2 comes to the exchange of all and to no pair."""
    if rank == 2:
        with Exchange(store, rank, world, name="check/all", lag=3, window_bytes=1 << 16) as exchange:
            return order(exchange)[1]
    return probe(store, rank, world, 1024, 3.0).failed


def test_a_pair_that_fails_does_not_stop_the_others() -> None:
    zero, one, _ = (result.value for result in run_ranks(_only_pairs_fail, 3))
    assert set(zero) == set(one) == {2}
    assert "RendezvousError" in zero[2]


def test_what_cannot_connect_is_an_error() -> None:
    facts = [result.value for result in run_ranks(_probe, 2, False, env={"UCX_TLS": "self"})]
    assert all("Destination is unreachable" in each.error for each in facts), facts
    assert status(findings(facts)) == 1


# --- the command


def check(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    without = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "blsrdma", "check", *arguments]
    return subprocess.run(command, env=without | environment, capture_output=True, text=True, timeout=120)


def test_the_command(tmp_path) -> None:
    files = ["--json", str(tmp_path / "check.json"), "--plot", str(tmp_path / "check.png")]
    done = check("--ranks", "3", "--message", "64K", *files)
    values = json.loads((tmp_path / "check.json").read_text())
    assert done.returncode == values["status"] == 0, done  # slow on a busy machine is no error
    assert "within hosts: 3 pairs by direct stores" in done.stdout
    assert "order: 1200 messages looked at the moment they were announced, none of them incomplete" in done.stdout
    assert "bandwidth, GB/s" in done.stdout
    assert [each["rank"] for each in values["ranks"]] == [0, 1, 2]
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")


def test_wrong_arguments() -> None:
    for arguments, says in (
        ([], "no launcher has started this: use torchrun, srun or mpirun, or give --ranks N"),
        (["--ranks", "1"], "'1' is not a number of at least 2"),
        (["--ranks", "2", "--message", "big"], "'big' is not a size"),
    ):
        done = check(*arguments)
        assert done.returncode == (2 if arguments else 1), done
        assert says in done.stderr


def test_matrices_have_holes_where_nothing_was_measured() -> None:
    from blsrdma.heatmap import matrix

    found = matrix([{1: 2.0}, {}])
    np.testing.assert_array_equal(found, [[np.nan, 2.0], [np.nan, np.nan]])
