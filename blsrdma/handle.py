"""One iteration between post() and release(): `Handle`, and `Received`, the messages it brings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

from blsrdma.errors import CountsError, WindowHeld

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blsrdma.buffers import Array, SendBuffer
    from blsrdma.exchange import Exchange


class Handle:
    """One iteration of an exchange, from post() until release().

    `with handle as received:` waits, gives the messages and releases them at the end.
    """

    __slots__ = ("_buffer", "_exchange", "_released", "_send", "iteration")

    def __init__(self, exchange: Exchange, iteration: int, send: Array, buffer: SendBuffer) -> None:
        self._exchange = exchange
        self.iteration = iteration
        self._send = send  # kept alive: the exchange reads it until sent()
        self._buffer = buffer
        self._released = False

    def ready(self) -> bool:
        """Whether every rank's message is here, so that wait() returns at once."""
        self._exchange._usable()
        return self._released or self._exchange._core.ready(self.iteration)

    def wait(self, timeout: float | None = None) -> Received:
        """Wait for every rank's message of this iteration. Says nothing about sent().

        Raises PeerTimeout at the deadline (the wait may be repeated), PeerFailed, WindowCorrupt.
        """
        exchange = self._exchange
        exchange._usable()
        if self._released:
            raise WindowHeld(f"iteration {self.iteration} has been released: its windows may hold a later one")
        outcome = exchange._core.wait(self.iteration, exchange._ns(timeout))
        if outcome:
            raise exchange._error(outcome)
        return Received(self)

    def sent(self) -> bool:
        """Whether `send` may be overwritten: the messages have left it, and the message to oneself, which is a view of
        it unless copy_self is set, has been released."""
        self._exchange._usable()
        return self._exchange._core.sent(self.iteration)

    def release(self) -> None:
        """Give the windows back; the views die here. May come before wait(): then the messages are not wanted."""
        if self._released:
            return
        self._released = True
        exchange = self._exchange
        if not exchange._closed:
            exchange._core.release(self.iteration)
            if exchange._core.sent(self.iteration):
                exchange._in_flight.pop(self.iteration, None)

    @property
    def released(self) -> bool:
        return self._released

    def __enter__(self) -> Received:
        return self.wait()

    def __exit__(self, *_: object) -> None:
        self.release()


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
        exchange, buffer = self._handle._exchange, self._handle._buffer
        address, length = exchange._core.message(self._checked(), source)
        if source == exchange.rank and not exchange.settings.copy_self:
            send: Any = self._handle._send
            start = (address - buffer.address) // max(1, buffer.item_bytes)
            return send[start : start + length // buffer.item_bytes] if buffer.item_bytes else send[:0]
        if length % max(1, buffer.item_bytes):
            raise CountsError(
                f"rank {source} sent {length} bytes in iteration {self._handle.iteration}: not whole items of "
                f"{buffer.item_bytes} bytes, as this rank's `send` has"
            )
        start = address - exchange._arena.address
        return buffer.view(exchange._bytes[start : start + length])

    def __iter__(self) -> Iterator[Any]:
        return (self[q] for q in range(len(self)))

    def counts(self) -> list[int]:
        """Items per source, in units of `send`'s leading dimension."""
        item = max(1, self._handle._buffer.item_bytes)
        core, iteration = self._handle._exchange._core, self._checked()
        return [core.message(iteration, q)[1] // item for q in range(len(self))]

    def _checked(self) -> int:
        self._handle._exchange._usable()
        if self._handle._released:
            raise WindowHeld(f"iteration {self._handle.iteration} has been released: its views are gone")
        return self._handle.iteration
