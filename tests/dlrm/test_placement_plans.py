"""Placements other than contiguous blocks, and the plans that find them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from dlrm import kernels, planner
from dlrm.data.uniform import Uniform
from dlrm.dense import DenseWork
from dlrm.errors import OptionError
from dlrm.model import Dense
from dlrm.placement import Piece, Placement, read
from dlrm.shape import ModelShape, interaction_width
from dlrm.tables import Tables, lengths
from dlrm.verify import SingleProcess

ROWS = (100, 5000, 3, 700, 40, 900)
DIM = 8
SHAPE = ModelShape(ROWS, DIM, (4, DIM), (interaction_width(6, DIM, "dot", False), 1))


def costs(lookups: tuple[int, ...] = (1, 1, 1, 1, 1, 1)) -> planner.Costs:
    source = Uniform(4, ROWS, 3, lookups, True)
    return planner.costs(ROWS, DIM, kernels.choose(32), source.batches(64, 4))


def place(how: str, ranks: int, row_wise: int = 0, replicate: int = 0, **options: object) -> Placement:
    found = planner.place(how, ROWS, ranks, costs(**options), row_wise, replicate)  # type: ignore[arg-type]
    found.check(ROWS)
    return found


def test_costs_count_bytes_and_lookups() -> None:
    found = costs((1, 2, 3, 4, 5, 6))
    assert found.bytes == tuple(rows * 32 for rows in ROWS)
    assert found.lookups == (1, 2, 3, 4, 5, 6)


def test_contiguous_is_the_default() -> None:
    assert place("contiguous", 4) == Placement(6, 4)
    assert place("contiguous", 2, replicate=50).tables == ((0, 1), (3, 5))  # of those that are left


def test_greedy_balances_and_worst_does_not() -> None:
    balanced, contiguous, worst = (
        planner.plan(place(how, 3, lookups=(30, 30, 30, 1, 1, 1)), ROWS, costs((30, 30, 30, 1, 1, 1)), 128)
        for how in ("greedy", "contiguous", "worst")
    )
    assert max(balanced.lookup_ms) < max(contiguous.lookup_ms) < max(worst.lookup_ms)
    assert max(balanced.bytes) <= max(contiguous.bytes)
    assert [len(tables) for tables in worst.placement.tables] == [4, 1, 1]
    for plan in (balanced, contiguous, worst):
        assert sum(plan.bytes) == sum(ROWS) * 32
        assert sum(plan.lookups) == pytest.approx(93)


def test_row_wise_and_replicated_tables() -> None:
    found = place("greedy", 3, row_wise=800, replicate=40)
    assert found.replicated == (2, 4)
    assert found.divided == (1, 5)
    assert [piece.rows for own in found.pieces for piece in own if piece.table == 1] == [
        range(1667), range(1667, 3334), range(3334, 5000),
    ]  # fmt: skip
    plan = planner.plan(found, ROWS, costs(), 128)
    assert sum(plan.bytes) == (sum(ROWS) + 2 * (3 + 40)) * 32
    assert place("greedy", 1, row_wise=1, replicate=10_000).divided == ()  # one rank has all anyway


def test_a_placement_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    wanted = place("greedy", 3, row_wise=800, replicate=40)
    path.write_text(json.dumps(wanted.as_json()))
    assert read(path, 6, 3) == wanted
    assert place(str(path), 3) == wanted
    with pytest.raises(OptionError, match="is for 3 ranks, this run has 2"):
        read(path, 6, 2)
    for text in ("{}", "[]", '{"ranks": [["x"]]}', "no json"):
        path.write_text(text)
        with pytest.raises(OptionError, match="cannot be read as a placement"):
            read(path, 6, 1)


@pytest.mark.parametrize(
    ("pieces", "says"),
    [
        (((Piece(0),), (Piece(0),)), "table 0: row 0 has not just one owner"),
        (((Piece(0, range(5)),), (Piece(0, range(6, 10)),)), "table 0: row 5 has not just one owner"),
        (((Piece(0, range(5)),), (Piece(0, range(5, 9)),)), "rows end at 9, the table has 10"),
        (((Piece(0), Piece(0)), ()), "rank 0 has a table more than once"),
        (((Piece(0), Piece(1)), ()), "table 1, but the model has 1 tables"),
        (((), ()), "table 0: rows end at 0"),
    ],
)
def test_every_row_has_one_owner(pieces: tuple[tuple[Piece, ...], ...], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        Placement(1, 2, pieces).check((10,))


@pytest.mark.parametrize("pooling", ["sum", "mean"])
def test_whatever_the_placement_the_vectors_are_those_of_one_process(pooling: str) -> None:
    (batch,) = Uniform(4, ROWS, 3, 5, False).batches(30, 1)
    kernel, dense = kernels.choose(32), Dense(SHAPE, 1)
    whole = Tables(SHAPE, range(6), 1, kernel, pooling).lookup_all(batch)  # type: ignore[arg-type]
    for found in (place("worst", 3), place("greedy", 4, replicate=50), place("contiguous", 3, row_wise=800)):
        own = [Tables(SHAPE, pieces, 1, kernel, pooling) for pieces in found.pieces]  # type: ignore[arg-type]
        copies = Tables(SHAPE, found.replicated, 1, kernel, pooling)  # type: ignore[arg-type]
        got = []
        for samples in found.samples(30):
            mine = batch.slice(samples.start, samples.stop)
            parts = [one.lookup_all(batch)[samples.start : samples.stop] for one in own]
            if found.replicated:
                parts.append(copies.lookup_all(mine))
            piece = DenseWork(dense, 8).slice(samples)
            piece.bottom(batch.dense)
            means = {table: lengths(mine, table) for table in found.divided if pooling == "mean"}
            got.append(torch.empty(len(samples), 6, SHAPE.dim))
            piece.predict(parts, found.runs, means, got[-1])
        pooled = torch.cat(got)
        for table in range(6):
            if table in found.divided:  # another order of additions
                torch.testing.assert_close(pooled[:, table], whole[:, table], rtol=0, atol=5 * 5 * 2**-24)
            else:
                assert torch.equal(pooled[:, table], whole[:, table])
        divided = [piece for pieces in found.pieces for piece in pieces if piece.rows is not None]
        rest = Tables(SHAPE, [t for t in range(6) if t not in found.divided], 1, kernel, pooling)  # type: ignore[arg-type]
        parts_alone = [Tables(SHAPE, [piece], 1, kernel, pooling) for piece in divided]  # type: ignore[arg-type]
        alone = SingleProcess(rest, dense, found, 8, parts_alone).evaluate(batch)[0]
        assert torch.equal(alone, pooled)
