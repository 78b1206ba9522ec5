"""Requests by themselves: cut into windows of any size they ask for the same; random bytes are never believed."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import pytest
import torch

from blsrdma import request_windows
from blsrdma.lookup_tables import FORMATS as NAMES
from blsrdma.lookup_tables import Bags, Rows, TableFacts, describe, describe_bags
from blsrdma.ucx import native
from tests.lookup.bags import DIMS, FORMATS, draw, pooled, rows, same_bits

MALFORMED = 4
STORED = 32  # PartHead.flags: rows are wanted as they are stored


def drawn(rng: np.random.Generator) -> tuple[list[Rows], list[TableFacts], list[Bags], list[Any], list[Any]]:
    """Some tables, bags of them, and both as the core takes them."""
    tables, facts, bags, core_tables, parts = [], [], [], [], []
    for number in range(int(rng.integers(1, 6))):
        format_ = FORMATS[rng.integers(4)]
        dim = int(rng.choice(DIMS)) * (2 if format_ == "int4" else 1)
        tables.append(rows(number, int(rng.integers(1, 50)), dim, format_))
        about, data = describe(number, 1, tables[-1])
        assert isinstance(data, torch.Tensor)
        facts.append(about)
        core_tables.append((1, dim, NAMES.index(about.format), about.rows, 0, data.data_ptr()))
        bags.append(draw(rng, number, about.rows, int(rng.integers(0, 12)), int(rng.choice([1, 4, 90]))))
        indices, count, offsets, n, weights = describe_bags(bags[-1])
        parts.append((number, False, indices, count, offsets, n, weights, 0, dim))
    return tables, facts, bags, core_tables, parts


@pytest.mark.parametrize("seed", range(20))
def test_cut_requests_ask_for_the_same(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(20):
        tables, facts, bags, core_tables, parts = drawn(rng)
        room = int(rng.integers(request_windows.LEAST_REQUEST_BYTES, 2000)) // 8 * 8
        reply_room = int(rng.integers(4 * max(f.dim for f in facts), 5000))
        queries = native.queries_of(core_tables, parts, room, reply_room)
        assert all(len(query) <= room and reply <= reply_room for query, reply in queries)
        answers = native.answers_to(core_tables, 1, [query for query, _ in queries], reply_room)
        assert all(kind == 0 for kind, _ in answers)
        assert [len(found) for _, found in answers] == [reply for _, reply in queries]
        found = np.frombuffer(b"".join(found for _, found in answers), np.float32)
        wanted = torch.cat([pooled(table, each).reshape(-1) for table, each in zip(tables, bags, strict=True)])
        assert same_bits(torch.from_numpy(found.copy()), wanted)


def test_the_arithmetic_is_the_cores() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        alive = drawn(rng)
        _, facts, bags, core_tables, parts = alive
        used = [(b, f) for b, f in zip(bags, facts, strict=True) if len(b.offsets) > 1]
        queries = native.queries_of(core_tables, parts, 1 << 20, 1 << 20)
        size = request_windows.HEAD_BYTES + sum(
            request_windows.part_bytes(len(b.offsets) - 1, len(b.indices), weighted=b.weights is not None)
            for b, _ in used
        )
        replied = request_windows.response_bytes([(len(b.offsets) - 1, f.dim) for b, f in used])
        assert [(len(query), reply) for query, reply in queries] == ([(size, replied)] if used else [])


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_random_bytes_are_never_believed(seed: int) -> None:
    """Requests with some bytes changed, cut short, or of random bytes only: an answer that fits, or a refusal."""
    rng = np.random.default_rng(seed)
    kinds: dict[int, int] = {}
    for turn in range(300):
        if turn % 10 == 0:
            alive = drawn(rng)  # the core has only addresses
            _, facts, _, core_tables, parts = alive
        reply_room = int(rng.integers(4 * max(f.dim for f in facts), 3000))
        queries = [bytearray(query) for query, _ in native.queries_of(core_tables, parts, 400, reply_room)]
        few = rng.integers(0, facts[0].rows, int(rng.integers(1, 9))).astype(np.uint32)
        fetch = struct.pack("<IIIIQQ", 1, 0, 0, STORED, 0, len(few)) + few.tobytes()
        queries += [bytearray(fetch + bytes(-len(fetch) % 8)) for _ in range(3)]
        rng.shuffle(queries)
        for query in queries:
            how = rng.integers(4)
            for _ in range(int(rng.integers(1, 4)) if how else 0):
                at = int(rng.integers(min(len(query), 40) if how == 1 else len(query)))
                query[at] = int(rng.choice([0, 1, 255, 128, rng.integers(256)]))
            if how == 3:
                del query[int(rng.integers(len(query))) :]
        queries.append(bytearray(rng.bytes(int(rng.integers(0, 100)))))
        for kind, found in native.answers_to(core_tables, 1, [bytes(query) for query in queries], reply_room):
            assert len(found) <= reply_room
            kinds[kind] = kinds.get(kind, 0) + 1
    assert kinds[0] > 100  # some changes do no harm
    assert min(kinds.get(kind, 0) for kind in (2, 3, MALFORMED)) > 20, kinds


def test_rows_as_they_are_stored() -> None:
    tables, facts, _, core_tables, _ = drawn(np.random.default_rng(2))
    wanted = np.arange(facts[0].rows, dtype=np.uint32)[::-1]
    query = struct.pack("<IIIIQQ", 1, 0, 0, STORED, 0, len(wanted)) + wanted.tobytes() + bytes(-4 * len(wanted) % 8)
    ((kind, found),) = native.answers_to(core_tables, 1, [query], 1 << 16)
    assert kind == 0
    assert isinstance(tables[0].data, torch.Tensor)
    stored = tables[0].data.flip(0).contiguous().view(torch.uint8).numpy().tobytes()
    assert found[: len(stored)] == stored
    assert native.answers_to(core_tables, 1, [query], len(stored) - 1)[0][0] == MALFORMED


def test_an_owner_answers_for_its_own_tables_only() -> None:
    alive = drawn(np.random.default_rng(1))
    _, _, _, core_tables, parts = alive
    queries = [query for query, _ in native.queries_of(core_tables, parts, 1 << 16, 1 << 16)]
    assert [kind for kind, _ in native.answers_to(core_tables, 1, queries, 1 << 16)] == [0]
    assert [kind for kind, _ in native.answers_to(core_tables, 0, queries, 1 << 16)] == [3]
