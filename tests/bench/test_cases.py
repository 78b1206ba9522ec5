"""The sizes of messages: the same for every system, on every machine."""

from __future__ import annotations

import numpy as np
import pytest

from bench.cases import HEAVY, ZIPF_RANKS, Case, average_bytes, bytes_label, pattern, sizes


def test_uniform_sizes() -> None:
    assert sizes(Case(3, "1K", 0)).tolist() == [[[1024] * 3] * 3]


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_zipf_sizes_have_their_mean_and_law(ranks: int) -> None:
    case = Case(ranks, "zipf", 4)
    table = sizes(case)
    others = np.sort(table[:, ~np.eye(ranks, dtype=bool)].ravel())[::-1]
    assert abs(average_bytes(case) / 65536 - 1) < 0.01
    assert 0.95 < others[0] / others[-1] / ZIPF_RANKS < 1.05
    median = others[len(others) // 2]
    assert 1.8 < others.mean() / median < 3  # skewed
    assert not (table % 64).any()
    assert len({phase.tobytes() for phase in table}) > 16  # not the same every time


FIRST = [
    [24512, 20032, 44160, 38400],
    [28480, 25216, 80320, 14976],
    [442048, 21504, 51968, 110464],
    [18368, 27584, 220992, 16064],
]


RANDOM = [86912, 59520, 35968, 28608]


def test_zipf_sizes_never_change() -> None:
    table = sizes(Case(4, "zipf", 0))
    assert table[0].tolist() == sizes(Case(4, "zipf", 7, "copy"))[0].tolist()
    assert table[0].tolist() == FIRST  # a change makes all earlier numbers incomparable


def test_a_heavy_sender_and_a_heavy_receiver() -> None:
    table = sizes(Case(4, "sender", 0))
    assert table.shape == (1, 4, 4)
    assert abs(table[0, 0, 1] / table[0, 1, 0] - HEAVY) < 0.05
    assert abs(average_bytes(Case(4, "sender", 0)) / 65536 - 1) < 0.01
    assert (sizes(Case(4, "receiver", 0))[0] == table[0].T).all()


def test_random_sizes_have_their_mean_and_never_change() -> None:
    table = sizes(Case(4, "random", 0))
    assert abs(average_bytes(Case(4, "random", 0)) / 65536 - 1) < 0.1
    assert 0 <= table.min() < 4096 and 120_000 < table.max() <= 131072
    assert table[0, 0].tolist() == RANDOM


def test_bytes() -> None:
    assert [pattern(text) for text in ("1K", "zipf", "sender:1M")] == [("", 1024), ("zipf", 65536), ("sender", 1 << 20)]
    assert (bytes_label("1K"), bytes_label("zipf")) == ("1 KiB", "zipf, mean 64 KiB")
    with pytest.raises(ValueError, match="size"):
        pattern("much")
