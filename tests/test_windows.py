"""The layout of an arena: nothing overlaps, everything is aligned, Python and the core agree."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from blsrdma import windows
from blsrdma.ucx import native
from blsrdma.windows import WindowGeometry, windows_needed

geometries = st.builds(
    WindowGeometry,
    ranks=st.integers(1, 9),
    windows=st.integers(1, 8),
    window_bytes=st.integers(0, 1000),
    copy_self=st.booleans(),
    guard_bytes=st.sampled_from([0, 64, 192]),
)


def regions(geometry: WindowGeometry, rank: int) -> list[tuple[int, int]]:
    """(start, end) of all that somebody writes in `rank`'s arena."""
    found = [(0, windows.LINE_BYTES), (windows.LINE_BYTES, 2 * windows.LINE_BYTES)]
    for source in range(geometry.ranks):
        control = geometry.control_offset + source * windows.CONTROL_BYTES
        found.append((control, control + windows.CONTROL_BYTES))
        if source == rank and not geometry.copy_self:
            continue
        for iteration in range(geometry.windows):
            start = geometry.window(rank, source, iteration)
            found.append((start, start + windows.HEADER_BYTES + max(windows.LEAST_PAYLOAD, geometry.window_bytes)))
    staging = geometry.ranks * (
        windows.STAGING_BYTES + geometry.windows * (windows.HEADER_BYTES + windows.LEAST_PAYLOAD)
    )
    found.append((geometry.staging_offset, geometry.staging_offset + staging))
    return found


@given(geometries)
def test_regions_are_disjoint_aligned_and_inside(geometry: WindowGeometry) -> None:
    for rank in range(geometry.ranks):
        found = sorted(regions(geometry, rank))
        assert all(start % windows.LINE_BYTES == 0 for start, _ in found)
        assert all(end <= start for (_, end), (start, _) in pairwise(found))
        assert found[-1][1] <= geometry.arena_bytes


@given(geometries)
def test_guards_lie_around_every_window(geometry: WindowGeometry) -> None:
    written = sorted(regions(geometry, 0))
    for source in range(1, geometry.ranks):
        for iteration in range(geometry.windows):
            start = geometry.window(0, source, iteration)
            end = start + windows.HEADER_BYTES + max(windows.LEAST_PAYLOAD, geometry.window_bytes)
            before = [other_end for other_start, other_end in written if other_end <= start]
            after = [other_start for other_start, _ in written if other_start >= end]
            assert start - max(before) >= geometry.guard_bytes
            assert min(after) - end >= geometry.guard_bytes


@given(geometries, st.integers(0, 2**62))
def test_the_core_computes_the_same_offsets(geometry: WindowGeometry, iteration: int) -> None:
    core = native.Geometry()
    for field in ("ranks", "windows", "window_bytes", "window_stride", "control_offset", "windows_offset",
                  "staging_offset", "arena_bytes"):  # fmt: skip
        setattr(core, field, getattr(geometry, field))
    for receiver in range(geometry.ranks):
        for source in range(geometry.ranks):
            if source == receiver and not geometry.copy_self:
                continue
            assert core.window(receiver, source, iteration) == geometry.window(receiver, source, iteration)
            assert core.control(source) == geometry.control_offset + source * windows.CONTROL_BYTES


def test_constants_of_the_core() -> None:
    for name in ("LINE_BYTES", "CONTROL_BYTES", "HEADER_BYTES", "STAGING_BYTES", "LEAST_PAYLOAD"):
        assert getattr(native, name) == getattr(windows, name)


@pytest.mark.parametrize("lag", [0, 1, 2, 7])
def test_iterations_in_flight_have_windows_of_their_own(lag: int) -> None:
    geometry = WindowGeometry(ranks=2, windows=windows_needed(lag), window_bytes=10)
    # A sender at most lag + 1 ahead of a receiver that holds lag + 1 unreleased: 2 (lag + 1) live at once.
    live = [geometry.window(0, 1, i) for i in range(100, 100 + 2 * (lag + 1))]
    assert len(set(live)) == len(live)
    assert geometry.window(0, 1, 100 + 2 * (lag + 1)) == live[0]
