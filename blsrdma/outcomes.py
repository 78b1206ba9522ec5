"""From what the native core reports to the typed errors of blsrdma.errors."""

from __future__ import annotations

from blsrdma.buffers import tag_name
from blsrdma.errors import (
    BlsrdmaError,
    CountsError,
    DtypeMismatch,
    MessageTooLarge,
    PeerFailed,
    PeerLeft,
    PeerTimeout,
    WindowCorrupt,
    WindowHeld,
)
from blsrdma.ucx import native

_Outcome = native.Outcome


def typed_error(outcome: int, core: native.Exchange, name: str, self_rank: int, world_size: int) -> BlsrdmaError:
    """The error for an outcome other than OK that `core`, rank `self_rank`'s part of exchange `name`, has just
    returned."""
    kind = _Outcome(outcome)
    rank, iteration, a, b, text = core.details()
    if kind == _Outcome.TIMEOUT:
        counters = {q: core.counter(q) for q in range(world_size) if q != self_rank}
        missing = [q for q, n in counters.items() if n <= iteration]
        behind = ", ".join(f"rank {q} (has sent {counters[q]})" for q in missing) or f"rank {rank}: {text}"
        return PeerTimeout(
            f"exchange {name!r}, rank {self_rank}: iteration {iteration} is not complete; missing: {behind}",
            iteration, missing, {q: counters[q] for q in missing},
        )  # fmt: skip
    if kind == _Outcome.WINDOW_HELD:
        return WindowHeld(
            f"iteration {core.next} cannot be posted while this rank still holds iteration {iteration}: "
            "release its handle first"
        )
    if kind == _Outcome.COUNT_NEGATIVE:
        return CountsError(f"counts[{rank}] = {a - (1 << 64)}: must be >= 0")
    if kind == _Outcome.COUNT_SUM:
        return CountsError(f"counts add up to {a} items, send has {b}")
    if kind == _Outcome.TOO_LARGE:
        return MessageTooLarge(
            f"the message to rank {rank} in iteration {iteration} has {a} bytes, the window {b}: "
            f"construct the Exchange with window_bytes >= {a}"
        )
    where = f"exchange {name!r}, iteration {iteration}: rank {rank}"
    if kind == _Outcome.TAG_MISMATCH:
        reason = f"posted elements of type {tag_name(a)}, this rank of type {tag_name(b)}"
        failure: PeerFailed = DtypeMismatch(f"{where} {reason}", rank, iteration, reason)
    elif kind == _Outcome.CORRUPT:
        failure = WindowCorrupt(f"{where}: {text}", rank, iteration, text)
    elif kind == _Outcome.PEER_LEFT:
        failure = PeerLeft(f"{where} left before it posted it: {text}", rank, iteration, text)
    elif kind == _Outcome.PEER_ERRED:
        failure = PeerFailed(f"{where} failed: {text}", rank, iteration, text)
    else:
        failure = PeerFailed(f"{where} died: {text}", rank, iteration, text)
    return failure
