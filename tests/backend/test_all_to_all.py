"""all_to_all_single and all_to_all on the backend "bls": the same bits as on gloo, or as computed."""

from __future__ import annotations

import random
from collections import deque

import pytest
import torch
import torch.distributed as dist

from tests.backend.groups import both, group, same
from tests.ranks import run_ranks

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.complex64, torch.complex128, torch.bool,
]  # fmt: skip


def values(shape, dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    integers = torch.randint(0, 100, tuple(shape), generator=generator)
    return (integers % 2 == 0) if dtype is torch.bool else integers.to(dtype)


def splits_of(world: int, seed: int, largest: int = 7) -> list[list[int]]:
    """splits[s][d]: rows from s to d, some of them none."""
    chance = random.Random(seed)
    return [[chance.choice([0, 1, chance.randrange(largest)]) for _ in range(world)] for _ in range(world)]


def _cases(rank, world):
    """What gloo can do too."""
    out = []

    def single(data, rows, *splits, **kwargs):
        output = torch.empty((rows, *data.shape[1:]), dtype=data.dtype)
        work = dist.all_to_all_single(output, data, *splits, **kwargs)
        if work is not None:
            assert isinstance(work, dist.Work)
            work.wait()
            assert work.is_completed() and work.is_success() and work.exception() is None
        out.append(output)

    for number, dtype in enumerate(DTYPES):
        if dtype in (torch.int16, torch.bool):
            continue  # not on gloo
        table = splits_of(world, number)
        rows = sum(table[s][rank] for s in range(world))
        expect = [table[s][rank] for s in range(world)]
        for trailing in ((), (3,), (2, 2)):
            single(values((2 * world, *trailing), dtype, rank), 2 * world)
            data = values((sum(table[rank]), *trailing), dtype, rank + 100)
            single(data, rows, expect, table[rank])
            single(data, rows, expect, table[rank], async_op=True)
    single(torch.empty(0), 0)
    single(torch.empty(0, 4), 0, [0] * world, [0] * world)
    list_out = [torch.empty(3, 2) for _ in range(world)]
    dist.all_to_all(list_out, [values((3, 2), torch.float32, rank * 10 + q) for q in range(world)])
    return out + list_out


@pytest.mark.parametrize("world", [1, 2, 3])
def test_same_bits_as_gloo(world):
    run_ranks(both, world, _cases)


def _what_gloo_cannot(rank, world, store):
    with group(rank, world, store):
        # any dtype
        for dtype in (torch.bool, torch.int16, torch.uint16, torch.float8_e4m3fn):
            data = torch.arange(2 * world).to(torch.float32).to(dtype)
            output = torch.empty(2 * world, dtype=dtype)
            dist.all_to_all_single(output, data)
            same(output, data[2 * rank : 2 * rank + 2].repeat(world))
        # lists of different sizes and shapes, empty ones too
        for dtype in (torch.float32, torch.complex64, torch.bool):
            for async_op in (False, True):
                sizes = splits_of(world, 5)
                send = [values((sizes[rank][q], 2), dtype, 10 * rank + q) for q in range(world)]
                outputs = [torch.empty(sizes[q][rank], 2, dtype=dtype) for q in range(world)]
                work = dist.all_to_all(outputs, send, async_op=async_op)
                if async_op:
                    work.wait()
                for q in range(world):
                    same(outputs[q], values((sizes[q][rank], 2), dtype, 10 * q + rank), q)
        # not contiguous, on either side
        whole = torch.arange(4.0 * world * world).reshape(2 * world, 2 * world) + 100 * rank
        output = torch.zeros(2 * world, 2 * world)
        dist.all_to_all_single(output.t(), whole.t())
        expected = torch.zeros(2 * world, 2 * world)
        mine = slice(2 * rank, 2 * rank + 2)
        expected.t().copy_(torch.cat([(whole + 100 * (q - rank)).t()[mine] for q in range(world)]))
        same(output, expected)
        strided = torch.zeros(4 * world)[::2]
        dist.all_to_all_single(strided, torch.arange(2.0 * world))
        same(strided, torch.arange(2.0)[None].add(2 * rank).repeat(world, 1).reshape(-1))
        outputs = list(torch.zeros(2, world).t())
        dist.all_to_all(outputs, list((torch.arange(2.0 * world).reshape(2, world) + 10 * rank).t()))
        assert [o.tolist() for o in outputs] == [[rank + 10 * q, world + rank + 10 * q] for q in range(world)]
        # rows of another shape on each side, and rows without elements
        flat = torch.empty(4 * world)
        dist.all_to_all_single(flat, torch.arange(4.0 * world).reshape(2 * world, 2))
        same(flat, torch.arange(4.0).add(4 * rank).repeat(world))
        dist.all_to_all_single(torch.empty(world, 0), torch.empty(world, 0))
        # negated and conjugated views, Parameters, tensors that require grad
        z = torch.complex(torch.arange(2.0 * world), torch.ones(2 * world))
        output = torch.empty(2 * world)
        dist.all_to_all_single(output, z.conj().imag)
        same(output, -torch.ones(2 * world))
        parameter = torch.nn.Parameter(torch.zeros(2 * world))
        dist.all_to_all_single(parameter, torch.ones(2 * world, requires_grad=True))
        same(parameter.detach(), torch.ones(2 * world))
        # after completion the input may be overwritten
        for _ in range(50):
            data, output = torch.full((world,), 7), torch.empty(world, dtype=torch.int64)
            dist.all_to_all_single(output, data)
            data.fill_(-1)
            assert output.tolist() == [7] * world


@pytest.mark.parametrize("environment", [{}, {"BLSRDMA_DIRECT": "0"}], ids=["direct", "puts"])
def test_what_gloo_cannot(environment):
    run_ranks(_what_gloo_cannot, 3, env=environment)


def _in_flight(rank, world, store, lag):
    """Operations in flight, waited for in any order, or never."""
    with group(rank, world, store, lag=lag) as pg:
        works = deque()
        for i in range(60):
            table = splits_of(world, i)
            data = values((sum(table[rank]),), torch.float32, 1000 * i + rank)
            output = torch.full((sum(table[s][rank] for s in range(world)),), -1.0)
            splits = [table[s][rank] for s in range(world)], table[rank]
            works.append((i, dist.all_to_all_single(output, data, *splits, async_op=True), output, table))
            assert pg.exchange.lag == lag and len(pg._lane._flying) <= lag + 1
            if i % 7 == 6:
                order = list(works)
                works.clear()
                random.Random(i).shuffle(order)
                for j, work, result, sizes in order:
                    if j % 5 == 4:
                        continue  # dropped
                    if j % 2:
                        assert work.wait() is True
                    else:
                        while not work.is_completed():
                            pass
                    starts = [sum(sizes[s][:rank]) for s in range(world)]
                    parts = [
                        values((sum(sizes[s]),), torch.float32, 1000 * j + s)[starts[s] : starts[s] + sizes[s][rank]]
                        for s in range(world)
                    ]
                    same(result, torch.cat(parts), j)
                    assert work.result()[0] is result


@pytest.mark.parametrize("lag", [0, 2])
def test_operations_in_flight(lag):
    run_ranks(_in_flight, 3, lag)


def _futures(rank, world, store):
    with group(rank, world, store, lag=1):
        output = torch.empty(world)
        dist.all_to_all_single(output, output)  # the first one, which meets the others
        if rank:
            dist.barrier()  # rank 0's future cannot be done before
        work = dist.all_to_all_single(output, torch.arange(1.0 * world) + rank, async_op=True)
        doubled = work.get_future().then(lambda future: future.value()[0] * 2)
        if not rank:
            assert not work.is_completed() and not doubled.done()
            dist.barrier()
        assert doubled.wait().tolist() == [2.0 * (q + rank) for q in range(world)]
        assert work.is_completed()
        same(work.get_future().wait()[0], output)
        done = dist.group.WORLD.all_to_all_single(output, output.clone(), [], [])
        done.wait()
        assert done.get_future().wait()[0] is output


def test_futures():
    run_ranks(_futures, 2)


def _larger_than_a_window(rank, world, store):
    """One rank waits at once, the others do something else first: nobody's wait depends on it."""
    with group(rank, world, store, window_bytes=1024):
        data = torch.arange(5000 * world) + rank
        for _ in range(3):
            output = torch.empty(5000 * world, dtype=torch.int64)
            work = dist.all_to_all_single(output, data, async_op=True)
            if rank:
                dist.barrier()
                work.wait()
            else:
                work.wait()
                dist.barrier()
            same(output, torch.cat([torch.arange(5000) + 5000 * rank + q for q in range(world)]))
            dist.all_to_all_single(output, data)
            parts = [torch.empty(5000, dtype=torch.int64) for _ in range(world)]
            dist.all_to_all(parts, list(data.chunk(world)))
            same(torch.cat(parts), output)


def test_larger_than_a_window():
    run_ranks(_larger_than_a_window, 3)
