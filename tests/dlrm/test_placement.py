from __future__ import annotations

from itertools import chain

import pytest

from dlrm.placement import Placement, split


@pytest.mark.parametrize("total", [0, 1, 2, 5, 26, 127])
@pytest.mark.parametrize("parts", [1, 2, 3, 5, 8, 30])
def test_split_covers_everything_once_in_order_and_evenly(total: int, parts: int) -> None:
    pieces = split(total, parts)
    assert len(pieces) == parts
    assert list(chain(*pieces)) == list(range(total))
    lengths = [len(piece) for piece in pieces]
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths) - min(lengths) <= 1
    assert sum(length > total // parts for length in lengths) == total % parts  # the reference's rule


def test_largest_message_is_what_the_first_rank_sends_to_itself() -> None:
    placement = Placement(26, 4)
    assert [len(tables) for tables in placement.tables] == [7, 7, 6, 6]
    assert [len(samples) for samples in placement.samples(10)] == [3, 3, 2, 2]
    assert placement.largest_message(10, 16) == 3 * 7 * 16 * 4


def test_more_ranks_than_tables_and_samples() -> None:
    placement = Placement(2, 5)
    assert [len(tables) for tables in placement.tables] == [1, 1, 0, 0, 0]
    assert [len(samples) for samples in placement.samples(3)] == [1, 1, 1, 0, 0]
