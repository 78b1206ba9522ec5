"""One iteration between post() and release(): `Handle`, and `Received`, the messages it brings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from blsrdma.buffers import as_counts, describe, tag_name
from blsrdma.errors import CountsError, MemoryLimitExceeded, SendBufferError, WindowHeld
from blsrdma.outcomes import LARGE
from blsrdma.settings import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from blsrdma.buffers import Array, Counts, SendBuffer
    from blsrdma.exchange import Exchange


class Handle:
    """One iteration of an exchange, from post() until release().

    `with handle as received:` waits, gives the messages and releases them at the end.
    """

    __slots__ = ("_buffer", "_exchange", "_large", "_out", "_pulling", "_released", "_send", "iteration")

    def __init__(self, exchange: Exchange, iteration: int, send: Array, buffer: SendBuffer) -> None:
        self._exchange = exchange
        self.iteration = iteration
        self._send = send  # kept alive: the exchange reads it until sent()
        self._buffer = buffer
        self._released = False
        self._pulling = False  # large messages are being written where _out or _large say
        self._out: Array | None = None  # where all messages are, if the caller gave a place
        self._large: dict[int, NDArray[np.uint8]] = {}  # messages that no window holds, by source

    def ready(self) -> bool:
        """Whether every rank's message is here (large ones: their address), so that wait() need not wait for a peer."""
        self._exchange._unfailed()
        return self._released or self._exchange._core.ready(self.iteration)

    def wait(self, timeout: float | None = None, *, out: Array | None = None, counts: Counts | None = None) -> Received:
        """Wait for every rank's message of this iteration. Says nothing about sent().

        Parameters:
            timeout: seconds; None: the exchange's.
            out: memory for all messages, one after the other in rank order: a contiguous array or tensor of the same
                element type, with as many items as there are in all. What arrives then lives there, after release too.
                None: views of the windows; messages larger than a window get memory that counts against memory_limit.
            counts: items expected from each rank, in units of the leading dimension of `send` (of `out`, if given).

        Raises PeerTimeout at the deadline (the wait may be repeated), PeerFailed, WindowCorrupt; and, with nothing
        lost: CountsError naming both ranks and sizes, SendBufferError for an unusable `out`, MemoryLimitExceeded.
        """
        exchange = self._exchange
        exchange._usable()
        if self._released:
            raise WindowHeld(f"iteration {self.iteration} has been released: its windows may hold a later one")
        timeout_ns = exchange._ns(timeout)
        if out is None and counts is None:
            outcome = exchange._core.wait(self.iteration, timeout_ns)
            if not outcome:
                return Received(self)
            if outcome != LARGE:
                raise exchange._error(outcome)
            end = _end(timeout_ns)
        else:
            end = _end(timeout_ns)
            outcome = exchange._core.wait(self.iteration, timeout_ns)
            if outcome not in (0, LARGE):
                raise exchange._error(outcome)
        self._place(out, counts, end if outcome == LARGE else None)
        return Received(self)

    def sent(self) -> bool:
        """Whether `send` may be overwritten: the messages have left it, the large ones have been pulled, and the
        message to oneself, which is a view of it unless copy_self is set, has been released.

        Messages larger than window_bytes are pulled when their receiver waits for them (or releases them): do not poll
        sent() before your own wait(), or two ranks that both do wait for each other. After a failure a peer that has
        not heard of it yet may still be pulling: keep `send` until close() has returned.
        """
        self._exchange._unfailed()
        return self._exchange._core.sent(self.iteration)

    def release(self) -> None:
        """Give the windows back; the views die here. May come before wait(): then the messages are not wanted."""
        if self._released:
            return
        self._released = True
        exchange = self._exchange
        if not exchange._closed:
            exchange._core.release(self.iteration)
            if not self._pulling:
                self._drop_large()
            exchange._forget(self)

    @property
    def released(self) -> bool:
        return self._released

    def __enter__(self) -> Received:
        return self.wait()

    def __exit__(self, *_: object) -> None:
        self.release()

    # --- inside

    def _drop_large(self) -> None:
        self._exchange._large_bytes -= sum(len(memory) for memory in self._large.values())
        self._large = {}

    def _lengths(self) -> list[int]:
        core = self._exchange._core
        return [core.message(self.iteration, q)[1] for q in range(self._exchange.world_size)]

    def _place(self, out: Array | None, counts: Counts | None, pull_until: float | None) -> None:
        """Give every message a place: `out`, or, if it is large, memory of its own; and pull large ones there."""
        exchange, core = self._exchange, self._exchange._core
        lengths = self._lengths()
        target = self._buffer if out is None else describe(out)
        if counts is not None:
            self._check(counts, lengths, target)
        into: list[tuple[int, int]] = []
        absent = [q for q in range(exchange.world_size) if core.message(self.iteration, q)[0] == 0 and lengths[q]]
        if out is not None:
            total = target.items * target.item_bytes
            if target.tag != self._buffer.tag:
                raise SendBufferError(
                    f"out has elements of type {tag_name(target.tag)}, send {tag_name(self._buffer.tag)}"
                )
            if sum(lengths) != total:
                raise CountsError(f"out has {total} bytes, the messages of iteration {self.iteration} {sum(lengths)}")
            starts = [0, *accumulate(lengths)]
            into = [(q, target.address + starts[q]) for q in absent]
        elif absent:
            exchange._count_large(sum(lengths[q] for q in absent if q not in self._large))
            for q in absent:
                memory = self._large.setdefault(q, np.empty(lengths[q], np.uint8))
                into.append((q, memory.__array_interface__["data"][0]))
        if pull_until is not None:
            self._out, self._pulling = out, True  # kept alive: it is written from here on
            left = pull_until - time.monotonic()
            outcome = core.pull(self.iteration, into, -1 if pull_until == float("inf") else max(0, round(left * 1e9)))
            if outcome:
                raise exchange._error(outcome)
            self._pulling = False
        if out is not None:
            core.copy_out(self.iteration, target.address)
            self._out = out

    def _check(self, counts: Counts, lengths: list[int], target: SendBuffer) -> None:
        for q, (count, length) in enumerate(zip(as_counts(counts, len(lengths)).tolist(), lengths, strict=True)):
            if count * target.item_bytes != length:
                raise CountsError(
                    f"iteration {self.iteration}: rank {q} sent {length / max(1, target.item_bytes):g} items to rank "
                    f"{self._exchange.rank}, which expected {count}"
                )


class Received(Sequence[Any]):
    """The messages of one iteration: received[q] is rank q's, a view without a copy, of the kind and dtype of `send`.

    Its shape is (n, *send.shape[1:]). It is valid until the handle is released; read-only by convention.
    """

    __slots__ = ("_handle",)

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    def __len__(self) -> int:
        return self._handle._exchange.world_size

    @overload
    def __getitem__(self, source: int) -> Any: ...
    @overload
    def __getitem__(self, source: slice) -> list[Any]: ...
    def __getitem__(self, source: int | slice) -> Any:
        if isinstance(source, slice):
            return [self[q] for q in range(*source.indices(len(self)))]
        source = range(len(self))[source]
        handle = self._checked()
        exchange, buffer = handle._exchange, handle._buffer
        address, length = exchange._core.message(handle.iteration, source)
        if handle._out is not None:
            return self._slice_of_out(source)
        if source == exchange.rank and not (exchange.settings.copy_self and length <= exchange.window_bytes):
            send: Any = handle._send
            start = (address - buffer.address) // max(1, buffer.item_bytes)
            return send[start : start + length // buffer.item_bytes] if buffer.item_bytes else send[:0]
        if length % max(1, buffer.item_bytes):
            raise CountsError(
                f"rank {source} sent {length} bytes in iteration {handle.iteration}: not whole items of "
                f"{buffer.item_bytes} bytes, as this rank's `send` has"
            )
        if source in handle._large:
            return buffer.view(handle._large[source])
        start = address - exchange._arena.address
        return buffer.view(exchange._bytes[start : start + length])

    def __iter__(self) -> Iterator[Any]:
        return (self[q] for q in range(len(self)))

    def counts(self) -> list[int]:
        """Items per source, in units of `send`'s leading dimension."""
        handle = self._checked()
        return [length // max(1, handle._buffer.item_bytes) for length in handle._lengths()]

    def _slice_of_out(self, source: int) -> Any:
        out: Any = self._handle._out
        item_bytes = max(1, describe(out).item_bytes)
        starts = [0, *accumulate(self._handle._lengths())]
        return out[starts[source] // item_bytes : starts[source + 1] // item_bytes]

    def _checked(self) -> Handle:
        handle = self._handle
        handle._exchange._usable()
        if handle._released:
            raise WindowHeld(f"iteration {handle.iteration} has been released: its views are gone")
        return handle


def _end(timeout_ns: int) -> float:
    return float("inf") if timeout_ns < 0 else time.monotonic() + timeout_ns / 1e9


def refuse_over(limit: int, windows: int, large: int, more: int) -> None:
    """Raise MemoryLimitExceeded if `more` bytes of large messages would exceed the limit."""
    if windows + large + more > limit:
        raise MemoryLimitExceeded(
            f"messages larger than their windows need {format_size(more)}; with {format_size(windows)} of windows and "
            f"{format_size(large)} of other large messages held that exceeds memory_limit = {format_size(limit)}. "
            "Release what is held, pass wait(out=...), or raise the limit"
        )
