"""Where lookup requests and responses lie, and how large they are: pure arithmetic, no I/O.

Each rank has two arenas of the layout in blsrdma.windows: one that its peers write *requests* into, and one that they
write *responses* into. In both, every peer has lag + 1 windows, and message n of a pair uses window n % (lag + 1).

**Why lag + 1 are enough.** A rank writes request n to an owner only when it has consumed the owner's response to
n - lag - 1: that response says that the owner has read request n - lag - 1, so its window at the owner is free; and the
response window that the owner will use for n is the one that this rank has just emptied. The response is the
acknowledgement, pair by pair; nobody waits for a rank whose rows it does not need. (A collective, which has no answers,
needs 2 (lag + 1): see blsrdma.windows.) tests/model/lookups.py explores this rule, and what happens without it.

A request is a head, and per table a head, the bags' lengths (4 bytes each), the row numbers (4 bytes, or 8 for tables
of more than 2^32 - 1 rows) and the weights (4 bytes), each padded to 8 bytes. Its response is the pooled rows, 4 bytes
an element, or a refusal. What does not fit into one request is cut between bags, and a bag that does not fit by itself
between two of its rows.
"""

from __future__ import annotations

from blsrdma.windows import WindowGeometry, round_up

HEAD_BYTES = 8
PART_HEAD_BYTES = 24
LEAST_REQUEST_BYTES = 128  # a head, a table, and a few rows of one bag
_WIDE_ROWS = (1 << 32) - 1


def windows_needed(lag: int) -> int:
    """Windows per peer, for requests and for responses; the module's docstring says why."""
    return lag + 1


def part_bytes(bags: int, indices: int, *, table_rows: int = 0, weighted: bool = False) -> int:
    """Bytes of one table's bags in a request: `bags` of them, with `indices` row numbers in all."""
    number = 8 if table_rows > _WIDE_ROWS else 4
    size = PART_HEAD_BYTES + round_up(4 * bags, 8) + round_up(number * indices, 8)
    return size + (round_up(4 * indices, 8) if weighted else 0)


def request_bytes(parts: list[tuple[int, int]], *, weighted: bool = False) -> int:
    """Bytes of a request for `parts`, a pair (bags, indices) for each table of less than 2^32 rows."""
    return HEAD_BYTES + sum(part_bytes(bags, indices, weighted=weighted) for bags, indices in parts)


def response_bytes(parts: list[tuple[int, int]]) -> int:
    """Bytes of a response: `parts` is a pair (bags, dim) for each table."""
    return sum(4 * bags * dim for bags, dim in parts)


def geometries(ranks: int, lag: int, request: int, response: int) -> tuple[WindowGeometry, WindowGeometry]:
    """The request and the response arena of a rank, for windows of `request` and `response` bytes."""
    windows = windows_needed(lag)
    return WindowGeometry(ranks, windows, request), WindowGeometry(ranks, windows, response)
