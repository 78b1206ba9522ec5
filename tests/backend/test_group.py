"""The group: how it is made, divided and ended, and that everything else still works in it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

import blsrdma.errors
from blsrdma import Options
from tests.backend.groups import group
from tests.ranks import HOST, run_ranks, store_server


def exchange_ranks(pg=None) -> None:
    """An all_to_all in which everyone tells everyone its rank."""
    rank, world = dist.get_rank(pg), dist.get_world_size(pg)
    output = torch.full((world,), -1)
    dist.all_to_all_single(output, torch.full((world,), rank), group=pg)
    assert output.tolist() == list(range(world))


# --- how it is made


def _one_rank(rank, world, init_method):
    dist.init_process_group("bls", init_method=init_method, rank=rank, world_size=world)
    exchange_ranks()
    dist.destroy_process_group()


def _file_store(rank, world, store, path):
    _one_rank(rank, world, f"file://{path}")


def test_file_store(tmp_path):
    run_ranks(_file_store, 2, str(tmp_path / "store"))


@pytest.mark.slow
def test_spawn():
    server = store_server()  # for a free port
    port = server.port
    del server
    torch.multiprocessing.spawn(_one_rank, (2, f"tcp://{HOST}:{port}"), nprocs=2)


SCRIPT = """
import os, torch, torch.distributed as dist
dist.init_process_group("bls")
rank, world = dist.get_rank(), dist.get_world_size()
if rank == 1 and {restarts} and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    raise SystemExit(3)
output = torch.empty(world)
dist.all_to_all_single(output, torch.full((world,), float(rank)))
os.write(1, f"got {{output.tolist()}}\\n".encode())  # at once, for both ranks write into one pipe
if {destroy}:
    dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(("restarts", "destroy"), [(1, True), (0, False)])
def test_torchrun(tmp_path, restarts, destroy):
    """After a restart, and when a script does not end the group. (As it should be: test_installed.py.)"""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(restarts=restarts, destroy=destroy))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               f"--max-restarts={restarts}", "--monitor-interval=0.1", str(script)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("got [0.0, 1.0]") == 2, done.stdout
    assert time.monotonic() - began < 60


# --- what it says of itself, and the rest of torch.distributed


def _the_rest(rank, world, store):
    with group(rank, world, store) as pg:
        assert dist.get_backend() == "bls" and pg.name() == "bls" and pg._get_backend_name() == "bls"
        assert isinstance(pg, dist.ProcessGroup) and pg.exchange is None
        exchange_ranks()
        assert pg.exchange.stats()["iterations"] == 1
        tensor = torch.ones(3) * rank
        dist.all_reduce(tensor)
        assert tensor.tolist() == [world * (world - 1) / 2] * 3
        objects = [None] * world
        dist.all_gather_object(objects, {"rank": rank})
        assert objects == [{"rank": q} for q in range(world)]
        box = [rank]
        dist.broadcast_object_list(box, 1)
        assert box == [1]
        dist.barrier()
        received = torch.empty(1)
        if rank == 0:
            dist.send(torch.ones(1), 1)
        elif rank == 1:
            dist.recv(received, 0)
            assert received.item() == 1
        scattered, gathered = torch.empty(2), torch.empty(2 * world)
        dist.reduce_scatter_tensor(scattered, torch.ones(2 * world))
        dist.all_gather_into_tensor(gathered, scattered)
        assert gathered.tolist() == [world] * 2 * world
        works = [dist.isend(torch.ones(1), (rank + 1) % world), dist.irecv(received, (rank - 1) % world)]
        for work in works:
            work.wait()
        pg.set_timeout(timedelta(seconds=17))
        assert pg._lane.timeout == 17
        pg.shutdown()
        pg.shutdown()
        with pytest.raises(blsrdma.errors.ExchangeClosed):
            exchange_ranks()
    with group(rank, world, dist.PrefixStore("again", store)):
        exchange_ranks()


def test_the_rest():
    run_ranks(_the_rest, 3)


def test_torch_calls_nothing_with_the_gil_held():
    """Every method of torch's trampoline for Python groups is overridden: see blsrdma.backend_group."""
    import re

    from blsrdma.backend_group import BlsProcessGroup

    header = Path(torch.__file__).parent / "include/torch/csrc/distributed/c10d/PyProcessGroup.hpp"
    if not header.exists():
        pytest.skip("no headers in this build of torch")
    collectives = set(re.findall(r"intrusive_ptr<Work> (\w+)\(", header.read_text()))
    assert len(collectives) > 8
    assert not {name for name in collectives if name not in vars(BlsProcessGroup)}


# --- parts of it


def _parts(rank, world, store):
    with group(rank, world, store) as pg:
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3], pg_options=Options(lag=2))]
        mine = pairs[rank // 2]
        exchange_ranks(mine)
        assert mine.exchange.lag == 2 * (rank // 2) and pg.exchange is None
        exchange_ranks()
        odd = dist.new_group([3, 1], use_local_synchronization=True)
        if rank % 2:
            exchange_ranks(odd)
            dist.destroy_process_group(odd)
        mixed = dist.new_group(backend="gloo")
        dist.barrier(mixed)
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("row", "column"))
        for name in ("row", "column"):
            exchange_ranks(mesh[name].get_group())
        exchange_ranks(mesh._flatten("all").get_group())
        half = pg.split_group([0, 2], group_name="half", group_desc="zero and two")
        assert (half is None) == (rank % 2 == 1)
        if half:
            assert (half.group_name, half.rank(), half.size()) == ("half", rank // 2, 2)
            output = torch.empty(2)
            half.alltoall_base(output, torch.full((2,), float(rank)), [], []).wait()
            assert output.tolist() == [0, 2]
            half.allreduce([output]).wait()
            assert output.tolist() == [0, 4]
            half.shutdown()
        with pytest.raises(NotImplementedError):
            pg.merge_remote_group(store, 2)
        half = pairs[rank // 2]  # both halves divide themselves: torch gives both halves' parts the same names
        alone, _ = dist.new_subgroups(group_size=1, group=half)
        assert dist.get_process_group_ranks(alone) == [rank]
        subgroup, _ = dist.new_subgroups(2)
        exchange_ranks(subgroup)


def test_parts():
    run_ranks(_parts, 4)


def _two_words(rank, world, store):
    with group(rank, world, store, "cpu:bls,cuda:nccl"):
        exchange_ranks()
        dist.barrier()
    with group(rank, world, dist.PrefixStore("x", store), "cpu:bls"):
        exchange_ranks()


def test_backend_by_device():
    run_ranks(_two_words, 2)


def _in_another_world(rank, world, store):
    with group(rank, world, store, "gloo"):
        pg = dist.new_group(backend="bls", pg_options=Options(lag=2))
        exchange_ranks(pg)
        assert pg.exchange.lag == 2
        options = Options(lag=1, timeout=20)
        mesh = dist.init_device_mesh("cpu", (world,), mesh_dim_names=("x",), backend_override={"x": ("bls", options)})
        exchange_ranks(mesh.get_group("x"))
        assert mesh.get_group("x").exchange.settings.timeout == 20


def test_groups_of_a_world_of_gloo():
    run_ranks(_in_another_world, 2)


# --- its settings


def _settings(rank, world, store):
    with group(rank, world, store, lag=3, window_bytes=5000, timeout=40) as pg:
        exchange_ranks()
        assert pg.exchange.lag == 3 and pg.exchange.window_bytes == 5000
    os.environ["BLSRDMA_LAG"] = "1"
    with group(rank, world, dist.PrefixStore("2", store), timeout=40) as pg:
        exchange_ranks()
        assert pg.exchange.lag == 1
        assert pg.exchange.settings.timeout == 40  # init_process_group's
    os.environ["BLSRDMA_TIMEOUT"] = "33"
    with group(rank, world, dist.PrefixStore("3", store), timeout=40) as pg:
        exchange_ranks()
        assert pg.exchange.settings.timeout == 33

    def refused(number, options, error, **match):
        own = dist.PrefixStore(str(number), store)
        with pytest.raises(error, **match):
            dist.init_process_group("bls", store=own, rank=rank, world_size=world, pg_options=options)

    with group(rank, world, dist.PrefixStore("4", store), timeout=40) as pg:
        assert pg._lane.timeout == 33
    refused(5, Options(lag=rank), blsrdma.errors.SettingsMismatch, match="lag is 0 on rank 0; 1 on rank 1")
    for number, wrong in enumerate((Options(lag=-1), {"lag": 1}, "lag")):
        refused(6 + number, wrong, blsrdma.errors.SettingsError)
    # One rank's mistake ends all of them
    error = blsrdma.errors.RendezvousError if rank else blsrdma.errors.SettingsError
    refused(10, None if rank else Options(timeout=-1), error, match="timeout = -1")


def test_settings():
    run_ranks(_settings, 2)


# --- the end


def _abort(rank, world, store):
    with group(rank, world, store, timeout=60):
        exchange_ranks()
        if rank == 0:
            pg = dist.group.WORLD
            threading.Timer(0.5, pg.abort).start()
            began = time.monotonic()
            with pytest.raises(blsrdma.errors.BlsrdmaError, match="aborted"):
                exchange_ranks()
            assert time.monotonic() - began < 5
            dist.distributed_c10d._abort_process_group()
            assert not dist.is_initialized()
            pg.abort()
            store.set("aborted", "1")
        else:
            store.wait(["aborted"])
            exchange_ranks()  # which rank 0 had still posted
            with pytest.raises(blsrdma.errors.PeerFailed, match="aborted"):
                exchange_ranks()


def test_abort():
    run_ranks(_abort, 2)
