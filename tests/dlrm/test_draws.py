"""Generated rows: how they are distributed, and that they are the same everywhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dlrm.data import MLPERF_HOTNESS, draws, open_source
from dlrm.data.stack import Distances, StackDistance
from dlrm.errors import DataError, OptionError
from dlrm.options import parse

ONES = np.ones(200_000, np.int64)


def drawn(text: str, size: int, lengths: np.ndarray = ONES, table: int = 3) -> np.ndarray:
    return draws.parse(text).rows(np.random.default_rng(7), table, size, lengths)


@pytest.mark.parametrize("text", ["uniform", "gaussian:sigma=300", "zipf:s=0.9", "zipf:s=1,q=2.5", "pareto"])
@pytest.mark.parametrize("size", [1, 2, 1000, 3_000_000])
def test_rows_are_in_range_and_repeatable(text: str, size: int) -> None:
    rows = drawn(text, size)
    assert rows.dtype == np.int64
    assert 0 <= rows.min() <= rows.max() < size
    np.testing.assert_array_equal(rows, drawn(text, size))


@pytest.mark.parametrize("s", [0.5, 0.9, 1.0, 1.3])
@pytest.mark.parametrize("q", [0.0, 5.0])
@pytest.mark.parametrize("size", [1000, 400_000])  # the latter has more ranks than are summed one by one
def test_zipf_mandelbrot_probabilities(s: float, q: float, size: int) -> None:
    ranks = draws.Zipf(s, q).ranks(np.random.default_rng(1).random(len(ONES)), size)
    weights = (np.arange(1, size + 1) + q) ** -s
    wanted = np.cumsum(weights) / weights.sum()
    found = np.cumsum(np.bincount(ranks, minlength=size)) / len(ranks)
    assert np.abs(found - wanted).max() < 1.95 / np.sqrt(len(ranks))  # Kolmogorov-Smirnov, one in a thousand


def test_hot_rows_take_their_share() -> None:
    rows = drawn("zipf:s=0.5,hot=4,share=0.3", 1_000_000)
    top = np.sort(np.bincount(rows))[::-1]
    np.testing.assert_allclose(top[:4] / len(rows), 0.3 / 4, rtol=0.05)
    assert top[4] / len(rows) < 0.01


def test_popular_ranks_are_scattered_one_to_one() -> None:
    for size in (1, 2, 10, 1000, 4096):
        np.testing.assert_array_equal(np.sort(draws.scatter(np.arange(size), 5, size)), np.arange(size))
    assert np.ptp(draws.scatter(np.arange(10), 5, 10_000)) > 5_000


def test_gaussian_is_clipped_around_its_mean() -> None:
    rows = drawn("gaussian:mu=20,sigma=15", 1000)
    assert 19 < rows.mean() < 22
    assert (rows == 0).mean() > 0.07


def test_rows_of_a_pareto_bag_follow_from_its_first() -> None:
    rows = drawn("pareto:a=0.25", 50, np.full(5000, 6, np.int64)).reshape(-1, 6)
    for first in range(50):
        bags = rows[rows[:, 0] == first]
        assert len(bags) > 50
        assert (bags == bags[0]).all()


def test_hotness_of_each_table() -> None:
    source = open_source(
        parse("--num-indices-per-lookup mlperf --num-indices-per-lookup-fixed --data-generation random".split())
    )
    (batch,) = source.batches(8, 1)
    assert tuple(len(indices) // 8 for indices in batch.indices) == MLPERF_HOTNESS
    with pytest.raises(OptionError, match="has 2 numbers for 26 tables"):
        open_source(parse("--num-indices-per-lookup 3-4".split()))


def test_stack_distances_are_those_of_the_file(tmp_path: Path) -> None:
    cumulated = np.array([0.2, 0.5, 0.9, 1.0])
    (tmp_path / "dist_emb_j.log").write_text("nothing")
    for table in range(2):
        rows = ", ".join(str(row) for row in range(10, 60))
        text = f"{rows}\n0, 1, 4, 50\n{', '.join(map(str, cumulated))}\n"
        (tmp_path / f"dist_emb_{table}.log").write_text(text)
    line = f"--data-trace-file {tmp_path}/dist_emb_j.log --arch-embedding-size 100-100 --num-indices-per-lookup 3"
    source = open_source(parse(line.split()))
    assert isinstance(source, StackDistance)
    one, again = (next(iter(source.batches(50, 1))) for _ in range(2))
    assert torch.equal(one.indices[1], again.indices[1])
    assert not torch.equal(one.indices[0], one.indices[1])

    trace = Distances(tmp_path / "dist_emb_0.log").trace(np.random.default_rng(2), 20_000)
    stack = list(range(10, 60))
    seen = []
    for row in trace.tolist():
        place = len(stack) - stack.index(row)
        seen.append(0 if place == len(stack) else place)
        stack.remove(row)
        stack.append(row)
    counts = np.bincount(seen[500:], minlength=51) / len(seen[500:])
    # A distance of 50 is that of the row at the bottom: the one that a new reference takes, too.
    np.testing.assert_allclose([counts[1], counts[4], counts[0] + counts[50]], [0.3, 0.4, 0.3], atol=0.02)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("1, 2\n", "line 2: '' is not a list of numbers"),
        ("1, 2\n0, x\n0.5, 1\n", "line 2: '0, x' is not a list"),
        ("1, 2\n0, 1\n0.5\n", "line 3: 1 probabilities for 2 distances"),
        ("1, 2\n0, 3\n0.5, 1\n", "no more than the 2 rows"),
        ("1, 2\n0, 1\n0.5, 0.9\n", "must rise to 1"),
    ],
)
def test_malformed_stack_distances(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "d.log").write_text(text)
    with pytest.raises(DataError, match=says):
        Distances(tmp_path / "d.log")


def test_the_distances_of_the_reference(test_data: Path) -> None:
    if not (test_data / "dist_emb_0.log").is_file():
        pytest.skip("dist_emb_0.log is not in BLSRDMA_TEST_DATA")
    trace = Distances(test_data / "dist_emb_0.log").trace(np.random.default_rng(1), 1000)
    assert set(trace.tolist()) == {1, 2, 3, 4, 5, 6}
    assert trace[0] == 1
