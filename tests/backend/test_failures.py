"""What goes wrong surfaces as a typed error from the wait that meets it, with names and sizes."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from blsrdma.errors import CountsError, DtypeMismatch, PeerFailed, PeerLeft, PeerTimeout
from tests.backend.groups import group
from tests.ranks import run_ranks


def _mismatch(rank, world, store):
    """Rank 1 sends rank 0 three rows, rank 0 expects two. The pair is named, and the group goes on."""
    with group(rank, world, store, lag=1):
        for async_op in (False, True):
            send, expect = ([2, 2, 2], [2, 2, 2]) if rank != 1 else ([3, 2, 2], [2, 2, 2])
            output = torch.zeros(sum(expect), 2)
            arguments = (output, torch.ones(sum(send), 2), expect, send)
            if rank:
                dist.all_to_all_single(*arguments)
                assert output.sum() == 2 * sum(expect)
            else:
                with pytest.raises(CountsError, match=r"rank 1 sent 3 items to rank 0, which expected 2"):
                    if async_op:
                        work = dist.all_to_all_single(*arguments, async_op=True)
                        assert not work.is_success()
                        work.wait()
                    else:
                        dist.all_to_all_single(*arguments)
                if async_op:
                    assert isinstance(work.exception(), CountsError)
                    with pytest.raises(CountsError):
                        work.wait()
                    with pytest.raises(Exception, match="rank 1 sent 3 items to rank 0"):
                        work.get_future().wait()
        output = torch.empty(world)
        dist.all_to_all_single(output, torch.full((world,), float(rank)))
        assert output.tolist() == list(range(world))


def test_split_mismatch():
    run_ranks(_mismatch, 3)


def _refused(rank, world, store):
    """The same inputs are refused as by gloo, with a RuntimeError, before anything is sent."""
    probe = torch.zeros(4)
    cases = [
        (torch.zeros(4), probe, None, None),  # the reference DLRM's probe
        (torch.zeros(world), torch.zeros(world), [world - 1] + [0] * (world - 1), None),
        (torch.zeros(world), torch.zeros(world), None, [1] * (world + 1)),
        (torch.zeros(world), torch.zeros(world), None, [2] * world),
    ]
    outcomes = {}
    for backend in ("bls", "gloo"):
        with group(rank, world, store, backend):
            for number, (output, data, out_splits, in_splits) in enumerate(cases):
                try:
                    dist.all_to_all_single(output, data, out_splits, in_splits)
                    outcome = "done"
                except RuntimeError:
                    outcome = "RuntimeError"
                outcomes.setdefault(number, []).append(outcome)
            if backend == "bls":
                with pytest.raises(RuntimeError):
                    dist.all_to_all_single(torch.tensor(1.0), torch.tensor(1.0))
                with pytest.raises(CountsError):
                    dist.all_to_all([torch.zeros(1)], [torch.zeros(1)])
                with pytest.raises(CountsError):
                    dist.all_to_all_single(torch.zeros(2), torch.zeros(2), [3] + [0] * (world - 2) + [-1], None)
    assert all(len(set(each)) == 1 for each in outcomes.values()), outcomes
    return outcomes[0][0]


@pytest.mark.parametrize(("world", "probe"), [(2, "done"), (3, "RuntimeError")])
def test_refused_where_gloo_refuses(world, probe):
    assert [r.value for r in run_ranks(_refused, world)] == [probe] * world


def _timeout(rank, world, store):
    with group(rank, world, store, timeout=30, lag=2):
        output = torch.empty(world)
        dist.all_to_all_single(output, torch.zeros(world))
        if rank == 0:
            work = dist.all_to_all_single(output, torch.ones(world), async_op=True)
            began = time.monotonic()
            with pytest.raises(PeerTimeout) as caught:
                work.wait(timedelta(seconds=0.3))
            assert caught.value.missing == (1,) and 0.2 < time.monotonic() - began < 5
            assert isinstance(caught.value, TimeoutError) and not work.is_completed()
            store.set("go", "")
            work.wait()  # nothing is lost
            assert output.tolist() == [1] * world
        else:
            store.wait(["go"])
            dist.all_to_all_single(output, torch.ones(world))
        if rank == 0:
            with pytest.raises(PeerTimeout):
                dist.group.WORLD.all_to_all_single(output, torch.ones(world), [], [], timedelta(seconds=0.1)).wait(
                    timedelta(seconds=0.1)
                )
            store.set("over", "")
        else:
            store.wait(["over"])


def test_timeout():
    run_ranks(_timeout, 2)


def _dead_peer(rank, world, store, how):
    with group(rank, world, store, timeout=30):
        output = torch.empty(world)
        dist.all_to_all_single(output, torch.zeros(world))
        if rank == 2:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            return
        work = dist.all_to_all_single(output, torch.ones(world), async_op=True)
        began = time.monotonic()
        with pytest.raises(PeerFailed if how == "kill" else PeerLeft) as caught:
            work.wait()
        assert caught.value.rank == 2 and time.monotonic() - began < 10
        assert work.is_completed() and not work.is_success() and isinstance(work.exception(), PeerFailed)
        with pytest.raises(PeerFailed):
            dist.all_to_all_single(output, torch.ones(world))


@pytest.mark.parametrize("how", ["kill", "leave"])
def test_dead_peer(how):
    run_ranks(_dead_peer, 3, how, expect_exit={2: -signal.SIGKILL} if how == "kill" else None)


def _dtypes_differ(rank, world, store):
    with group(rank, world, store, timeout=30):
        output = torch.empty(world, dtype=torch.float32 if rank else torch.int32)
        with pytest.raises(DtypeMismatch):
            dist.all_to_all_single(output, torch.zeros_like(output))


def test_dtypes_differ_between_ranks():
    run_ranks(_dtypes_differ, 2)


def _dropped(rank, world, store):
    """Works that nobody waits for or keeps, and their tensors: nothing else is disturbed."""
    with group(rank, world, store, lag=3):
        for i in range(200):
            dist.all_to_all_single(torch.empty(100 * world), torch.full((100 * world,), float(i)), async_op=True)
            if i % 10 == 9:
                output = torch.empty(world)
                dist.all_to_all_single(output, torch.full((world,), float(i)))
                assert output.tolist() == [i] * world
        if rank:
            dist.all_to_all_single(torch.empty(world), torch.zeros(world), async_op=True)  # until the end


def test_dropped_works():
    run_ranks(_dropped, 2)
