"""The sizes of messages: the same for every system, on every machine."""

from __future__ import annotations

import numpy as np
import pytest

from bench.cases import ZIPF_RANKS, Case, average_bytes, bytes_label, sizes, zipf_mean


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


def test_zipf_sizes_never_change() -> None:
    table = sizes(Case(4, "zipf", 0))
    assert table[0].tolist() == sizes(Case(4, "zipf", 7, "copy"))[0].tolist()
    assert table[0].tolist() == FIRST  # a change makes all earlier numbers incomparable


def test_bytes() -> None:
    assert (zipf_mean("1K"), zipf_mean("zipf"), zipf_mean("zipf:1M")) == (None, 65536, 1 << 20)
    assert (bytes_label("1K"), bytes_label("zipf")) == ("1 KiB", "zipf, mean 64 KiB")
    with pytest.raises(ValueError, match="size"):
        zipf_mean("much")
