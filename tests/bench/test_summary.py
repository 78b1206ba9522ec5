"""From samples to medians and ratios."""

from __future__ import annotations

import pytest

from bench.summary import best_peer, chunk_times, ratio, summarise


def test_summary() -> None:
    s = summarise([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (s.median, s.q1, s.q3, s.low, s.high, s.mean, s.count) == (3, 2, 4, 1, 5, 3, 5)
    assert s.spread == pytest.approx(1 / 3)
    assert summarise([7.0]).q1 == 7
    with pytest.raises(ValueError, match="no samples"):
        summarise([])


def test_a_chunk_ends_when_its_last_rank_does() -> None:
    # Rank 1 runs ahead in the first chunk: that must not make the second one longer or the first one shorter.
    assert chunk_times([[0, 100, 200], [10, 40, 210]], turns=10) == [9.0, 11.0]


def test_chunks_add_up_to_the_whole_time() -> None:
    stamps = [[0, 7, 9, 30], [3, 5, 22, 29], [1, 2, 3, 31]]
    assert sum(chunk_times(stamps, 1)) == 31 - 3


def test_ratio_compares_within_repetitions() -> None:
    found = ratio("peer", [[4.0, 4.0], [40.0]], [[1.0], [10.0, 10.0]])
    assert (found.low, found.high, found.peer) == (4, 4, "peer")


def test_best_peer_is_the_fastest() -> None:
    peers = {"slow": [[9.0]], "fast": [[6.0]]}
    best = best_peer(peers, [[2.0]])
    assert best is not None
    assert (best.peer, best.value) == ("fast", 3)
    assert best_peer({}, [[2.0]]) is None
