"""One iteration of a GpuExchange: `Placement`, before it is posted; `GpuHandle`, until it is released; `GpuReceived`,
the messages it brings.
"""

from __future__ import annotations

from time import monotonic_ns
from typing import TYPE_CHECKING, Any

from blsrdma.errors import WindowHeld
from blsrdma.gpu.device import stream_address
from blsrdma.settings import timeout_ns

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from blsrdma.gpu import arrays
    from blsrdma.gpu.device import Stream
    from blsrdma.gpu.exchange import GpuExchange


class Placement:
    """An iteration whose messages a kernel writes: `addresses[q]`, for rank q's, is for this exchange's device."""

    def __init__(self, exchange: GpuExchange, handle: GpuHandle, addresses: list[int]) -> None:
        self._exchange, self._handle = exchange, handle
        self.iteration, self.addresses = handle.iteration, addresses

    def post(self) -> GpuHandle:
        """Send what the work that the stream of place() holds now will have written."""
        if self._exchange._placed is not self:
            raise WindowHeld(f"iteration {self.iteration} has been posted already")
        self._exchange._inner._usable()
        self._exchange._placed = None
        self._exchange._hand_over(0, self._handle._stream)
        return self._handle


class GpuHandle:
    """One iteration between post() and release(). `with handle as received:` waits, gives the messages, and releases
    them behind what the stream of its post() holds at the end."""

    def __init__(
        self, exchange: GpuExchange, iteration: int, buffer: arrays.GpuBuffer, own_bytes: int, stream: int
    ) -> None:
        self._exchange, self._buffer, self._own_bytes, self._stream = exchange, buffer, own_bytes, stream
        self._send: Any = None  # kept alive: the exchange reads it until sent()
        self.iteration, self.released = iteration, False

    @property
    def item_bytes(self) -> int:
        """Bytes of one item of `send`, along its leading dimension."""
        return self._buffer.item_bytes

    def ready(self) -> bool:
        """Whether every rank's message is here, so that wait() need not wait for a peer."""
        inner = self._exchange._inner
        inner._unfailed()
        return self.released or inner._core.ready(self.iteration)

    def wait(self, timeout: float | None = None, *, stream: Stream = None) -> GpuReceived:
        """Wait on the host until every rank's message of this iteration has arrived. Work that is launched afterwards
        on `stream` (None: that of post()) finds them. Raises PeerTimeout, PeerFailed, WindowCorrupt, as Handle.wait."""
        exchange = self._exchange
        exchange._inner._usable()
        if self.released:
            raise WindowHeld(f"iteration {self.iteration} has been released: its windows may hold a later one")
        limit = exchange._timeout_ns if timeout is None else timeout_ns(timeout)
        began = monotonic_ns()
        outcome = exchange._core.wait(self.iteration, self._on(stream), limit)
        exchange._traced("wait", self.iteration, began, outcome)
        if outcome:
            raise exchange._inner._error(outcome)
        return GpuReceived(self)

    def sent(self) -> bool:
        """Whether `send` may be overwritten: the messages have left it, and that to oneself, a view of it, has been
        released and is not used any more. See also order_after_sent()."""
        return self._exchange._core.sent(self.iteration)

    def order_after_sent(self, stream: Stream = None) -> None:
        """What is put on `stream` (None: that of post()) from now on may overwrite `send`, without the host's waiting;
        after release(), if there is a message to oneself."""
        self._exchange._core.order_after_sent(self.iteration, self._on(stream))

    def release(self, stream: Stream = None) -> None:
        """Give the windows back, once what `stream` (None: that of post()) holds now is done. The views die here."""
        if self.released or self._exchange._closed:
            return
        self.released = True
        self._exchange._core.release(self.iteration, self._on(stream))

    def __enter__(self) -> GpuReceived:
        return self.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _on(self, stream: Stream) -> int:
        return self._stream if stream is None else stream_address(stream, self._exchange.device)


class GpuReceived:
    """The messages of one iteration: received[q] is rank q's, a view without a copy, of the kind and dtype of `send`;
    valid until release(). `addresses[q]` and `sizes[q]` (bytes) are for kernels."""

    def __init__(self, handle: GpuHandle) -> None:
        self._handle = handle

    def __len__(self) -> int:
        return self._handle._exchange.world_size

    def __getitem__(self, source: int) -> Any:
        ranks = len(self)
        if not -ranks <= source < ranks:
            raise IndexError(f"rank {source} of {ranks}")
        if self._handle.released:
            raise WindowHeld(f"iteration {self._handle.iteration} has been released: its views have died")
        return self._handle._exchange._view(self._handle, source % ranks)

    def __iter__(self) -> Iterator[Any]:
        return (self[q] for q in range(len(self)))

    @property
    def addresses(self) -> list[int]:
        """Where each rank's message is, on this exchange's device."""
        exchange = self._handle._exchange
        return [exchange._core.message(self._handle.iteration, q) for q in range(len(self))]

    @property
    def sizes(self) -> list[int]:
        """Bytes of each rank's message."""
        core, handle = self._handle._exchange._inner._core, self._handle
        return [core.message(handle.iteration, q)[1] for q in range(len(self))]

    def counts(self) -> list[int]:
        """Items per source, in units of `send`'s leading dimension."""
        return [size // max(1, self._handle._buffer.item_bytes) for size in self.sizes]
