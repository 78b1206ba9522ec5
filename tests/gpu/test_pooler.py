"""What an owner answers out of GPU memory is what it answers out of its own: to good requests and to forged ones."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from blsrdma import request_windows
from blsrdma.gpu import compiler, tables
from blsrdma.lookup_tables import Bags, Rows, describe_bags
from blsrdma.ucx import native
from tests.gpu import simulated
from tests.lookup.bags import pooled, same_bits
from tests.lookup.test_queries import STORED, drawn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from blsrdma._native import cuda
    from tests.gpu.memory import OnDevice

SECOND = 1_000_000_000
simulated_only = pytest.mark.parametrize("device", ["simulated"], indirect=True)
FAILED = 6  # Fault.kind


@pytest.fixture
def make(device: cuda.Device) -> Iterator[Callable[[int, int, int], cuda.GpuPooler]]:
    """Poolers; all of their memory is given back at the end."""
    made = []
    before = {what: simulated.live(what) for what in ("pinned", "streams")}  # `on` has device memory

    def pooler(request_bytes: int, response_bytes: int, dim: int) -> cuda.GpuPooler:
        image = compiler.compiled(tables.SOURCE, {}, device.capability).image
        made.append(native.cuda.GpuPooler(device, image, request_bytes, response_bytes, dim, 20 * SECOND))
        return made[-1]

    yield pooler
    assert all(each.close(10 * SECOND) for each in made)
    assert all(each.close(0) for each in made)
    assert all(simulated.live(what) <= count for what, count in before.items())  # of others' some may have gone, too


def resident(on: OnDevice, core_tables: list[Any], rows: list[Rows], shift: int = 0) -> list[Any]:
    """The same tables in GPU memory."""
    moved = []
    for (owner, dim, format_, count, offset, _), each in zip(core_tables, rows, strict=True):
        assert isinstance(each.data, torch.Tensor)
        moved.append((owner, dim, format_, count, offset, on.put(each.data, shift * each.data.element_size())))
    return moved


def alike(a: bytes, b: bytes) -> bool:
    """The same words; whatever is no number, is none in both."""
    one, other = np.frombuffer(a, np.float32), np.frombuffer(b, np.float32)
    same = one.view(np.uint32) == other.view(np.uint32)
    return len(one) == len(other) and bool((same | (np.isnan(one) & np.isnan(other))).all())


@pytest.mark.parametrize("seed", range(4))
def test_cut_requests(on: OnDevice, make: Callable[[int, int, int], cuda.GpuPooler], seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(10):
        rows, facts, bags, core_tables, parts = drawn(rng)
        mean = bool(rng.integers(2))
        parts = [(number, mean, *rest) for number, _, *rest in parts]
        room = int(rng.integers(request_windows.LEAST_REQUEST_BYTES, 2000)) // 8 * 8
        reply_room = int(rng.integers(4 * max(f.dim for f in facts), 5000))
        queries = [query for query, _ in native.queries_of(core_tables, parts, room, reply_room)]
        there = resident(on, core_tables, rows, int(rng.integers(2)))
        gpu = make(room, reply_room, max(f.dim for f in facts))
        answers = native.answers_to(there, 1, queries, reply_room, gpu)
        assert answers == native.answers_to(core_tables, 1, queries, reply_room)
        found = np.frombuffer(b"".join(found for _, found in answers), np.float32)
        wanted = torch.cat([pooled(table, each, mean).reshape(-1) for table, each in zip(rows, bags, strict=True)])
        assert same_bits(torch.from_numpy(found.copy()), wanted)
        assert gpu.failure() == (0, "")


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_forged_requests(on: OnDevice, make: Callable[[int, int, int], cuda.GpuPooler], seed: int) -> None:
    """Answered, or refused, as by the processor; an address that is no row's would end this process."""
    rng = np.random.default_rng(seed)
    kinds: dict[int, int] = {}
    for _ in range(40 if seed == 0 else 400):
        alive = drawn(rng)
        rows, facts, _, core_tables, parts = alive
        reply_room = int(rng.integers(4 * max(f.dim for f in facts), 3000))
        queries = [bytearray(query) for query, _ in native.queries_of(core_tables, parts, 400, reply_room)]
        few = rng.integers(0, facts[0].rows, int(rng.integers(1, 9))).astype(np.uint32)
        fetch = struct.pack("<IIIIQQ", 1, 0, 0, STORED, 0, len(few)) + few.tobytes()
        queries += [bytearray(fetch + bytes(-len(fetch) % 8)) for _ in range(2)]
        rng.shuffle(queries)
        for query in queries:
            how = rng.integers(3)
            for _ in range(int(rng.integers(1, 4)) if how else 0):
                at = int(rng.integers(min(len(query), 40) if how == 1 else len(query)))
                query[at] = int(rng.choice([0, 1, 255, 128, rng.integers(256)]))
        forged = [bytes(query) for query in queries]
        gpu = make(400, reply_room, max(f.dim for f in facts))
        answers = native.answers_to(resident(on, core_tables, rows), 1, forged, reply_room, gpu)
        for (kind, found), (wanted_kind, wanted) in zip(
            answers, native.answers_to(core_tables, 1, forged, reply_room), strict=True
        ):
            assert kind == wanted_kind
            assert alike(found, wanted) or kind
            kinds[kind] = kinds.get(kind, 0) + 1
    assert min(kinds.get(kind, 0) for kind in (0, 2, 3, 4)) >= 3, kinds


def part(table: int, flags: int, lengths: list[int], numbers: list[int]) -> bytes:
    """A part of a request, as native/query.h has it."""
    head = struct.pack("<IIQQ", table, flags, len(lengths), len(numbers))
    words = [np.array(each, np.uint32).tobytes() for each in (lengths, numbers)]
    return head + b"".join(each + bytes(-len(each) % 8) for each in words)


def test_a_request_that_goes_on_with_its_own_bag(on: OnDevice, make: Callable[[int, int, int], cuda.GpuPooler]) -> None:
    """Nobody asks like that, but whoever did would get an answer."""
    rows = Rows(torch.randn(30, 12, generator=torch.Generator().manual_seed(1)))
    assert isinstance(rows.data, torch.Tensor)
    core_tables = [(1, 12, 0, 30, 0, rows.data.data_ptr())]
    query = struct.pack("<II", 3, 0) + part(0, 16, [2, 3], [1, 2, 3, 4, 5])
    query += part(0, 8 | 16, [4], [6, 7, 8, 9]) + part(0, 8, [1, 2], [10, 11, 12])
    gpu = make(400, 400, 12)
    answer = native.answers_to(resident(on, core_tables, [rows]), 1, [query], 400, gpu)
    assert answer == native.answers_to(core_tables, 1, [query], 400)
    bags = Bags(0, torch.arange(1, 13), torch.tensor([0, 2, 10, 12]))
    assert answer[0][1] == pooled(rows, bags).numpy().tobytes()


@simulated_only
def test_requests_smaller_than_their_parts(on: OnDevice, make: Callable[[int, int, int], cuda.GpuPooler]) -> None:
    """Many small parts: what was set aside is used several times for one request, where it has to be."""
    rng = np.random.default_rng(3)
    rows = [Rows(torch.randn(9, 1, generator=torch.Generator().manual_seed(t))) for t in range(40)]
    core_tables = [(1, 1, 0, 9, 0, each.data.data_ptr()) for each in rows if isinstance(each.data, torch.Tensor)]
    bags = [Bags(t, torch.from_numpy(rng.integers(0, 9, 1)), torch.tensor([0, 1])) for t in range(40)]
    parts = []
    for each in bags:
        indices, count, offsets, n, weights = describe_bags(each)
        parts.append((each.table, False, indices, count, offsets, n, weights, 0, 1))
    queries = [query for query, _ in native.queries_of(core_tables, parts, 8192, 160)]
    assert len(queries) == 1
    before = simulated.calls("cuMemcpyAsync")
    answers = native.answers_to(resident(on, core_tables, rows), 1, queries, 160, make(8192, 160, 1))
    assert answers == native.answers_to(core_tables, 1, queries, 160)
    assert simulated.calls("cuMemcpyAsync") - before - len(rows) > 2  # 16 bytes of a result are less than a sum takes


@simulated_only
def test_it_is_not_done_in_time(on: OnDevice, device: cuda.Device) -> None:
    """It has failed then, for good, and what the GPU may still use is kept."""
    rows = Rows(torch.ones(4, 8))
    assert isinstance(rows.data, torch.Tensor)
    there = resident(on, [(1, 8, 0, 4, 0, 0)], [rows])
    image = compiler.compiled(tables.SOURCE, {}, device.capability).image
    gpu = native.cuda.GpuPooler(device, image, 400, 400, 8, 50_000_000)
    query = struct.pack("<II", 1, 0) + part(0, 0, [2], [1, 2])
    with simulated.hold():
        assert native.answers_to(there, 1, [query], 400, gpu)[0][0] == FAILED
        result, text = gpu.failure()
        assert result == -1
        assert re.fullmatch(r"it was not done within \d\d+ ms: it hangs, or is held up", text)
        assert not gpu.close(10_000_000)
    assert native.answers_to(there, 1, [query], 400, gpu)[0][0] == FAILED
    assert gpu.close(10 * SECOND)


@simulated_only
@pytest.mark.parametrize(("function", "calls"), [("cuMemcpyAsync", 0), ("cuLaunchKernel", 0), ("cuMemcpyAsync", 1)])
def test_a_call_fails(on: OnDevice, make: Callable[[int, int, int], cuda.GpuPooler], function: str, calls: int) -> None:
    rows = Rows(torch.ones(4, 8))
    gpu = make(400, 400, 8)
    there = resident(on, [(1, 8, 0, 4, 0, 0)], [rows])
    query = struct.pack("<II", 1, 0) + part(0, 0, [2], [1, 2])
    simulated.fail(function, 719, calls)
    assert [kind for kind, _ in native.answers_to(there, 1, [query, query], 400, gpu)] == [FAILED, FAILED]
    result, text = gpu.failure()
    assert result == 719
    assert text.startswith(f"{function} failed: CUDA_ERROR_LAUNCH_FAILED")


@simulated_only
def test_what_cannot_be_set_aside(device: cuda.Device) -> None:
    """Nothing of it stays."""
    before = {what: simulated.live(what) for what in ("device", "pinned")}
    image = compiler.compiled(tables.SOURCE, {}, device.capability).image
    for after in (0, 1):
        simulated.fail("cuMemAlloc_v2", 2, after)
        with pytest.raises(Exception, match="cuMemAlloc failed: CUDA_ERROR_OUT_OF_MEMORY"):
            native.cuda.GpuPooler(device, image, 400, 400, 8, SECOND)
    assert {what: simulated.live(what) for what in before} == before
