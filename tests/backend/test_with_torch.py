"""What is built on torch.distributed runs on it: DDP, DTensor, functional collectives, torch.compile, the profiler."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.distributed as dist

from tests.backend.groups import both, group, in_turn, same
from tests.ranks import run_ranks


def _ddp(rank, world):
    torch.manual_seed(0)
    model = torch.nn.parallel.DistributedDataParallel(
        torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        generator = torch.Generator().manual_seed(10 * step + rank)
        loss = model(torch.randn(4, 8, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def _dtensor(rank, world):
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = dist.init_device_mesh("cpu", (world,))
    torch.manual_seed(1)
    a, b = torch.randn(4 * world, 6 * world), torch.randn(6 * world, 5)
    rows = distribute_tensor(a, mesh, [Shard(0)])
    columns = rows.redistribute(mesh, [Shard(1)])  # an all_to_all
    product = columns @ distribute_tensor(b, mesh, [Shard(0)])
    return [columns.to_local(), product.redistribute(mesh, [Replicate()]).to_local(), rows.full_tensor()]


def _functional(rank, world):
    from torch.distributed import _functional_collectives as functional

    data = torch.arange(4.0 * world).reshape(2 * world, 2) + 100 * rank
    splits = [rank + 1] * world
    one = functional.all_to_all_single(data, None, None, dist.group.WORLD)
    uneven = functional.all_to_all_single(
        torch.full((sum(range(1, world + 1)),), float(rank)), splits, list(range(1, world + 1)), dist.group.WORLD
    )
    leaf = data.clone().requires_grad_()
    graph = functional.all_to_all_single_autograd(leaf, [2] * world, [2] * world, dist.group.WORLD)
    (graph * torch.arange(2.0 * world)[:, None] * (rank + 1)).sum().backward()
    # the result of one collective goes into the next while it is still in flight
    chained = torch.empty_like(data)
    dist.all_to_all_single(chained, functional.all_to_all_single(data, None, None, dist.group.WORLD))
    summed = functional.all_reduce(data, "sum", dist.group.WORLD)
    return [one * 1, uneven * 1, graph.detach() * 1, leaf.grad, chained, summed * 1]


def _compiled(rank, world):
    @torch.compile(backend="eager", fullgraph=True)
    def step(x):
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x * 2)
        y = out + 1
        dist.all_reduce(y)
        return y

    return [step(torch.arange(2.0 * world) + rank), step(torch.arange(2.0 * world) - rank)]


def _inference(rank, world):
    results = []
    with torch.inference_mode():
        data, output = torch.arange(3.0 * world) + rank, torch.empty(3 * world)
        dist.all_to_all_single(output, data)
        results.append(output)
        outputs = [torch.empty(3) for _ in range(world)]
        dist.all_to_all(outputs, list(data.chunk(world)))
        results += outputs
        rows = torch.empty(3 * world)
        work = dist.all_to_all_single(rows, data, async_op=True)
    work.wait()  # outside of it
    dist.all_to_all_single(rows, data)
    results.append(rows)
    with torch.inference_mode():
        normal = results[-1].clone()
        dist.all_gather_into_tensor(torch.empty(3 * world * world), normal)
    return results


def _fsdp(rank, world):
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    mesh = dist.init_device_mesh("cpu", (world,))
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    fully_shard(model, mesh=mesh)
    model(torch.randn(4, 8)).sum().backward()
    return [p.grad.full_tensor() for p in model.parameters()]


def test_same_as_on_gloo():
    run_ranks(in_turn, 2, *(partial(both, work=work) for work in (_ddp, _dtensor, _functional, _inference, _fsdp)))


@pytest.mark.slow
def test_compiled_same_as_on_gloo():
    run_ranks(both, 2, _compiled, timeout=120)


def _more_than_gloo(rank, world, store):
    from torch.distributed import _functional_collectives as functional

    with group(rank, world, store):
        with torch.inference_mode():
            outputs = [torch.empty(3) for _ in range(world)]
        dist.all_to_all(outputs, list(torch.full((3 * world,), float(rank)).chunk(world)))
        same(torch.stack(outputs), torch.arange(1.0 * world)[:, None].expand(world, 3))
        z = torch.arange(1, 5).to(torch.complex64) * (1 + 1j)
        received = functional.all_to_all_single(z.conj(), None, None, dist.group.WORLD)
        same(received * 1, z.conj().reshape(2, 2)[rank].repeat(2))


def _profiled(rank, world, store):
    with group(rank, world, store):
        data, output = torch.ones(world), torch.empty(world)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            dist.all_to_all_single(output, data)
            dist.all_to_all_single(output, data, async_op=True).wait()
            dist.all_to_all([torch.empty(1) for _ in range(world)], list(data.chunk(world)))
            dist.all_reduce(data)
        counts = {event.key: event.count for event in profile.key_averages()}
        assert counts["bls:all_to_all"] == 3 and counts["bls:wait"] == 1 and counts["gloo:all_reduce"] == 1


def _threads(rank, world, store):
    """Autograd's thread does the all_to_all of the backward pass, while this one waits for it."""
    from torch.distributed.nn.functional import all_to_all_single

    with group(rank, world, store, lag=1):
        leaf = torch.arange(2.0 * world, requires_grad=True)
        out = torch.empty(2 * world)
        result = all_to_all_single(out, leaf, group=dist.group.WORLD)
        (result * (rank + 1)).sum().backward()
        same(leaf.grad, torch.arange(1.0, world + 1).repeat_interleave(2))


def test_more_than_gloo_profiler_and_autograd():
    run_ranks(in_turn, 2, _more_than_gloo, _profiled, _threads)
