"""The arithmetic of request and response windows, without any."""

from __future__ import annotations

import pytest

from blsrdma import request_windows as rw
from blsrdma.ucx import native


def test_the_core_has_the_same_heads() -> None:
    assert native.QUERY_HEAD_BYTES == rw.HEAD_BYTES
    assert native.PART_HEAD_BYTES == rw.PART_HEAD_BYTES


@pytest.mark.parametrize("lag", [0, 1, 7])
def test_half_the_windows_of_a_collective(lag: int) -> None:
    requests, responses = rw.geometries(4, lag, 1000, 5000)
    assert requests.windows == responses.windows == lag + 1
    assert requests.window_bytes == 1000
    assert responses.window_bytes == 5000
    assert requests.arena_bytes > 3 * (lag + 1) * 1000
    assert responses.arena_bytes > 3 * (lag + 1) * 5000
    offsets = {responses.window(2, source, n) for source in (0, 1, 3) for n in range(3 * (lag + 1))}
    assert len(offsets) == 3 * (lag + 1)


def test_sizes() -> None:
    assert rw.part_bytes(0, 0) == 24
    assert rw.part_bytes(1, 1) == 24 + 8 + 8
    assert rw.part_bytes(2, 3) == 24 + 8 + 16
    assert rw.part_bytes(2, 3, weighted=True) == 24 + 8 + 16 + 16
    assert rw.part_bytes(2, 3, table_rows=1 << 32) == 24 + 8 + 24
    assert rw.part_bytes(2, 3, table_rows=(1 << 32) - 1) == 24 + 8 + 16
    assert rw.request_bytes([(2, 3), (1, 1)]) == 8 + 48 + 40
    assert rw.response_bytes([(2, 16), (3, 64)]) == 4 * (32 + 192)
    assert rw.LEAST_REQUEST_BYTES >= rw.request_bytes([(1, 1)], weighted=True)
