"""One iteration between post() and release(): `Handle`, and `Received`, the messages it brings.

Both are native (native/handle.cpp, received.cpp), for they are the inner loop. Here is what is not the usual case:
large messages, memory of the caller's that does not fit, dtypes that only Python knows.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from blsrdma.buffers import as_counts, describe, tag_name
from blsrdma.errors import CountsError, MemoryLimitExceeded, SendBufferError
from blsrdma.outcomes import TIMEOUT
from blsrdma.settings import format_size
from blsrdma.ucx import native

if TYPE_CHECKING:
    from blsrdma.buffers import Array, Counts, SendBuffer

Handle = native.Handle
Received = native.Received
Sequence.register(Received)


def place(handle: Handle, out: Array | None, counts: Counts | None, large: bool, until_ns: int) -> None:
    """Give every message of a complete iteration a place: `out`, or, if it is large, memory of its own; if there are
    large ones, pull them there by the time `until_ns` (of time.monotonic_ns(); negative: whenever). Raises as wait()
    does."""
    exchange = handle._exchange
    core = exchange._core
    lengths = _lengths(handle)
    target = handle._buffer if out is None else describe(out)
    if counts is not None:
        _check(handle, counts, lengths, target)
    into: list[tuple[int, int]] = []
    absent = [q for q in range(exchange.world_size) if core.message(handle.iteration, q)[0] == 0 and lengths[q]]
    if out is not None:
        _check_out(handle, target, sum(lengths))
        starts = [0, *accumulate(lengths)]
        into = [(q, target.address + starts[q]) for q in absent]
    elif absent:
        into = _memory_for(handle, absent, lengths)
    if large:
        handle._out, handle._pulling = out, True  # kept alive: it is written from here on
        outcome = core.pull(handle.iteration, into, -1 if until_ns < 0 else max(0, until_ns - time.monotonic_ns()))
        if outcome:
            raise exchange._error(outcome)
        handle._pulling = False
    if out is not None:
        core.copy_out(handle.iteration, target.address)
        handle._out = out


def pull_ahead(handle: Handle) -> None:
    """Pull the large messages of a complete iteration, as wait() without `out` would, but do not wait for them: a later
    call of this, or wait(), goes on from there. Does nothing where memory_limit does not allow it."""
    exchange = handle._exchange
    into: list[tuple[int, int]] = []
    if not handle._pulling:
        lengths = _lengths(handle)
        absent = [q for q, at in enumerate(lengths) if at and exchange._core.message(handle.iteration, q)[0] == 0]
        try:
            into = _memory_for(handle, absent, lengths)
        except MemoryLimitExceeded:
            return
    handle._pulling = True
    outcome = exchange._core.pull(handle.iteration, into, 0)
    if outcome not in (0, TIMEOUT):
        raise exchange._error(outcome)
    handle._pulling = bool(outcome)


def _memory_for(handle: Handle, sources: list[int], lengths: list[int]) -> list[tuple[int, int]]:
    """Memory, counted against the limit, for these sources' messages, as (source, address). MemoryLimitExceeded."""
    memory = handle._large or {}
    new = {q: np.empty(lengths[q], np.uint8) for q in sources if q not in memory}
    more = sum(map(len, new.values()))
    handle._exchange._count_large(more)
    handle._large = memory | new
    handle._large_bytes += more
    return [(q, handle._large[q].__array_interface__["data"][0]) for q in sources]


def message(handle: Handle, source: int) -> Any:
    """received[source], where it is not simply a view of a window or of `send`."""
    exchange = handle._exchange
    buffer = handle._buffer
    address, length = exchange._core.message(handle.iteration, source)
    if handle._out is not None:
        return _slice_of_out(handle, source)
    if source == exchange.rank and not (exchange.settings.copy_self and length <= exchange.window_bytes):
        send: Any = handle._send
        start = (address - buffer.address) // max(1, buffer.item_bytes)
        return send[start : start + length // buffer.item_bytes] if buffer.item_bytes else send[:0]
    if length % max(1, buffer.item_bytes):
        raise CountsError(
            f"rank {source} sent {length} bytes in iteration {handle.iteration}: not whole items of "
            f"{buffer.item_bytes} bytes, as this rank's `send` has"
        )
    if handle._large is not None and source in handle._large:
        return buffer.view(handle._large[source])
    start = address - exchange._arena.address
    return buffer.view(exchange._bytes[start : start + length])


def refuse_over(limit: int, windows: int, large: int, more: int) -> None:
    """Raise MemoryLimitExceeded if `more` bytes of large messages would exceed the limit."""
    if windows + large + more > limit:
        raise MemoryLimitExceeded(
            f"messages larger than their windows need {format_size(more)}; with {format_size(windows)} of windows and "
            f"{format_size(large)} of other large messages held that exceeds memory_limit = {format_size(limit)}. "
            "Release what is held, pass wait(out=...), or raise the limit"
        )


def _lengths(handle: Handle) -> list[int]:
    exchange = handle._exchange
    return [exchange._core.message(handle.iteration, q)[1] for q in range(exchange.world_size)]


def _check(handle: Handle, counts: Counts, lengths: list[int], target: SendBuffer) -> None:
    exchange = handle._exchange
    for q, (count, length) in enumerate(zip(as_counts(counts, len(lengths)).tolist(), lengths, strict=True)):
        if count * target.item_bytes != length:
            raise CountsError(
                f"iteration {handle.iteration}: rank {q} sent {length / max(1, target.item_bytes):g} items to rank "
                f"{exchange.rank}, which expected {count}"
            )


def _check_out(handle: Handle, target: SendBuffer, expected: int) -> None:
    total = target.items * target.item_bytes
    if not target.writable:
        raise SendBufferError("out is read-only")
    if target.tag != handle._buffer.tag:
        raise SendBufferError(f"out has elements of type {tag_name(target.tag)}, send {tag_name(handle._buffer.tag)}")
    if expected != total:
        raise CountsError(f"out has {total} bytes, the messages of iteration {handle.iteration} {expected}")


def _slice_of_out(handle: Handle, source: int) -> Any:
    out: Any = handle._out
    item_bytes = max(1, describe(out).item_bytes)
    starts = [0, *accumulate(_lengths(handle))]
    return out[starts[source] // item_bytes : starts[source + 1] // item_bytes]
