"""From what the native core reports to the typed errors of blsrdma.errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blsrdma.buffers import tag_name
from blsrdma.errors import (
    BlsrdmaError,
    ConcurrentUse,
    CountsError,
    DtypeMismatch,
    PeerFailed,
    PeerLeft,
    PeerTimeout,
    WindowCorrupt,
    WindowHeld,
)
from blsrdma.ucx import native

if TYPE_CHECKING:
    from collections.abc import Callable

_Outcome = native.Outcome
LARGE = int(_Outcome.LARGE)
TIMEOUT = int(_Outcome.TIMEOUT)


def typed_error(
    outcome: int, core: native.Exchange, name: str, self_rank: int, world_size: int, state: Callable[[int], str]
) -> BlsrdmaError:
    """The error for an outcome other than OK that `core`, rank `self_rank`'s part of exchange `name`, just returned.

    `state(q)` says whether rank q lives, in words.
    """
    kind = _Outcome(outcome)
    rank, iteration, a, b, text = core.details()
    where = f"exchange {name!r}, iteration {iteration}"
    if kind == _Outcome.TIMEOUT:
        counters = {q: core.counter(q) for q in range(world_size) if q != self_rank}
        if not text:
            counters = {q: n for q, n in counters.items() if n <= iteration}
        states = {q: state(q) for q in counters}
        outstanding = {q: core.bytes_outstanding(q) for q in counters}
        each = "; ".join(
            f"rank {q} ({states[q]}; {n} of its messages are here, {outstanding[q]} bytes for it have not left)"
            for q, n in counters.items()
        )
        complete = text or f"not complete at the deadline on rank {self_rank}; missing"
        return PeerTimeout(f"{where}: {complete}: {each}", iteration, counters, states, outstanding)
    if kind == _Outcome.WINDOW_HELD:
        return WindowHeld(
            f"iteration {core.next} cannot be posted while this rank still holds iteration {iteration}: "
            "release its handle first"
        )
    if kind == _Outcome.COUNT_NEGATIVE:
        return CountsError(f"counts[{rank}] = {a - (1 << 64)}: must be >= 0")
    if kind == _Outcome.COUNT_SUM:
        return CountsError(f"counts add up to {a} items, send has {b}")
    if kind == _Outcome.CONCURRENT:
        return ConcurrentUse(f"exchange {name!r}: another thread is in a call on it; one thread at a time")
    where += f": rank {rank}"
    if kind == _Outcome.TAG_MISMATCH:
        reason = f"posted elements of type {tag_name(a)}, this rank of type {tag_name(b)}"
        return DtypeMismatch(f"{where} {reason}", rank, iteration, reason)
    if kind == _Outcome.CORRUPT:
        return WindowCorrupt(f"{where}: {text}", rank, iteration, text)
    if kind == _Outcome.PEER_LEFT:
        return PeerLeft(f"{where} left before it posted it: {text}", rank, iteration, text)
    if kind == _Outcome.PEER_ERRED:
        return PeerFailed(f"{where} failed: {text}", rank, iteration, text)
    return PeerFailed(f"{where} died: {text}", rank, iteration, text)
