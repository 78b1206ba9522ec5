"""The exchange of one process group, made when it is first needed, and its operations in flight.

Operations are posted in the order of the calls and received in that order, each into the memory it was given, by
whichever call or thread needs it received: a later operation at the lag bound, or its own wait. Nobody need wait: an
operation that was forgotten holds its memory until a later one moves it out, or the group ends.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blsrdma.backend_operation import Operation, receive
from blsrdma.errors import BlsrdmaError, ExchangeClosed, PeerTimeout, SendBufferError
from blsrdma.exchange import Exchange

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import Store

    from blsrdma.handle import Handle

log = logging.getLogger("blsrdma")

_SLICE_S = 0.1  # native waits are cut into slices, so that Ctrl-C and abort() end them
_POLL_S = 0.0005  # between looks of the thread that completes what nobody waits for


class Lane:
    """All all_to_all operations of one group of ranks. Threads may share it; a lock puts their operations in order."""

    def __init__(self, store: Store, rank: int, ranks: int, timeout: float, **settings: Any) -> None:
        self._store = store
        self._rank = rank
        self._ranks = ranks
        self._settings = settings
        self.timeout = timeout
        self.exchange: Exchange | None = None  # before the first operation
        self._lag = self._window_bytes = 0  # the exchange's
        self._flying: deque[Operation] = deque()  # posted and not received
        self._lock = threading.Lock()
        self.ended: BaseException | None = None  # why, once close() has been called
        self._watched: deque[Operation] = deque()
        self._watching = threading.Lock()  # of the two around it
        self._watcher: threading.Thread | None = None

    # --- an operation

    def post(
        self,
        send: Tensor,
        counts: Sequence[int] | None,
        outputs: Tensor | list[Tensor],
        expected: list[int],
        timeout: float | None = None,
    ) -> Operation:
        """Post `send`; at the lag bound, complete the oldest operation first. `outputs` need not be contiguous.

        The exchange's receivers pull messages larger than a window, so their sender's wait would depend on when the
        others wait for theirs; where such are expected they are therefore pulled in the background.
        """
        with self._lock:
            operation = None
            exchange = self.exchange
            if exchange is not None and self.ended is None and len(self._flying) <= self._lag:
                operation = self._post_at_once(exchange, send, counts, outputs, expected)
            if operation is None:
                operation = self._post(send, counts, outputs, expected, self._deadline(timeout))
        if max(expected) * operation.handle.item_bytes > self._window_bytes:
            self._watch(operation)
        return operation

    def run(
        self,
        send: Tensor,
        counts: Sequence[int] | None,
        outputs: Tensor | list[Tensor],
        expected: list[int],
        timeout: float | None = None,
    ) -> None:
        """Post and wait."""
        with self._lock:
            operation = None
            if not self._flying and self.exchange is not None and timeout is None and self.ended is None:
                operation = self._run_alone(self.exchange, send, counts, outputs, expected)
                if operation is None:
                    return
            deadline = self._deadline(timeout)
            if operation is None:
                operation = self._post(send, counts, outputs, expected, deadline)
            try:
                self._finish(operation, deadline)
            except BaseException:
                # Nobody can wait for it again, so its output must not change any more.
                if operation in self._flying:
                    self._flying.remove(operation)
                    operation.handle.release()
                raise
        if operation.error is not None:
            raise operation.error

    def wait(self, operation: Operation, timeout: float | None = None) -> None:
        """Return when `operation` is done; raises its error. After a PeerTimeout the wait may be repeated."""
        if not operation.done:
            with self._lock:
                if timeout is not None or not self._receive_at_once(operation):
                    self._finish(operation, self._deadline(timeout))
        if operation.futures:
            operation.tell()
        if operation.error is not None:
            raise operation.error

    def poll(self, operation: Operation) -> bool:
        """Whether `operation` is done, well or badly; completes it if that takes no waiting."""
        if not operation.done:
            if not self._lock.acquire(blocking=False):
                return False  # somebody waits, maybe for this one
            try:
                while not operation.received and self._flying and self._flying[0].handle.ready():
                    self._receive_oldest(self._deadline(None))
                if operation.received and self._sent(operation.handle):
                    operation.done = True
            except PeerTimeout:
                return False
            except BlsrdmaError as error:
                operation.fail(error)
            finally:
                self._lock.release()
        if operation.done:
            operation.tell()
        return operation.done

    def future(self, operation: Operation) -> torch.futures.Future[list[Tensor]]:
        """A Future of `operation`, completed in the background if nobody waits."""
        future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        operation.futures.append(future)
        if not self.poll(operation):
            self._watch(operation)
        return future

    # --- the end

    def close(self, error: BaseException | None = None) -> None:
        """Leave: the peers get PeerLeft, or with an `error` PeerFailed, when they wait for more. Idempotent."""
        if self.ended is None:
            self.ended = error or ExchangeClosed("the process group has been destroyed")
        if not self._lock.acquire(timeout=10 * _SLICE_S):  # a waiter leaves within a slice
            return  # ... but for one that is still making the exchange: it closes it then
        try:
            dropped = list(self._flying)
            self._flying.clear()
            for operation in dropped:
                operation.handle.release()
                operation.fail(self.ended)
            if self.exchange is not None:
                if error is not None:  # the peers' windows matter no more; what they still write is quarantined
                    self.exchange.settings = replace(self.exchange.settings, close_timeout=0.2)
                self.exchange.close(error)
        finally:
            self._lock.release()
        for operation in dropped:
            operation.tell()

    # --- inside, with the lock held

    def _open(self) -> Exchange:
        self._refuse_if_ended()
        exchange = self._make()
        try:
            self._refuse_if_ended()  # meanwhile
        except BaseException as error:
            exchange.close(error)
            raise
        self.exchange = exchange
        self._lag, self._window_bytes = exchange.lag, exchange.window_bytes
        return exchange

    # What differs where tensors are in GPU memory (blsrdma.gpu.backend_lane).

    def _make(self) -> Exchange:
        return Exchange(self._store, self._rank, self._ranks, name="all_to_all", timeout=self.timeout, **self._settings)

    _receive = staticmethod(receive)

    def _sent(self, handle: Handle) -> bool:
        """Whether the caller may write into what was sent."""
        return handle.sent()

    def _refuse_if_ended(self) -> None:
        if self.ended is not None:
            raise self.ended

    def _post(
        self,
        send: Tensor,
        counts: Sequence[int] | None,
        outputs: Tensor | list[Tensor],
        expected: list[int],
        deadline: float,
    ) -> Operation:
        exchange = self.exchange or self._open()
        self._refuse_if_ended()
        while len(self._flying) > self._lag:
            self._receive_oldest(deadline)
        handle: Handle | None = None
        while handle is None:
            try:
                handle = exchange.post(send, counts, timeout=self._slice(deadline))
            except SendBufferError:
                usable = send.contiguous().resolve_conj().resolve_neg()
                if usable is send:
                    raise
                send = usable
            except PeerTimeout:
                if self._over(deadline):
                    raise
        operation = Operation(handle, outputs, expected)
        self._flying.append(operation)
        return operation

    # The short ways: what is usual, and takes less than a slice of time. They leave everything else to the long ones.

    def _post_at_once(
        self,
        exchange: Exchange,
        send: Tensor,
        counts: Sequence[int] | None,
        outputs: Tensor | list[Tensor],
        expected: list[int],
    ) -> Operation | None:
        try:
            handle = exchange.post(send, counts, timeout=_SLICE_S)
        except (PeerTimeout, SendBufferError):
            return None
        operation = Operation(handle, outputs, expected)
        self._flying.append(operation)
        return operation

    def _receive_at_once(self, operation: Operation) -> bool:
        """Whether `operation`, if it is the oldest, is done."""
        if not self._flying or self._flying[0] is not operation:
            return False
        handle = operation.handle
        try:
            self._receive(handle, operation.outputs, operation.expected, _SLICE_S)
        except BlsrdmaError:
            return False  # and is met again
        operation.received = True
        handle.release()
        self._flying.popleft()
        operation.done = self._sent(handle)
        return operation.done

    def _run_alone(
        self,
        exchange: Exchange,
        send: Tensor,
        counts: Sequence[int] | None,
        outputs: Tensor | list[Tensor],
        expected: list[int],
    ) -> Operation | None:
        """Post and wait, with nothing else in flight. What it has not finished it returns."""
        try:
            handle = exchange.post(send, counts, timeout=_SLICE_S)
        except (PeerTimeout, SendBufferError):
            return self._post(send, counts, outputs, expected, self._deadline(None))
        try:
            self._receive(handle, outputs, expected, _SLICE_S)
        except PeerTimeout:
            operation = Operation(handle, outputs, expected)
            self._flying.append(operation)
            return operation
        except BaseException:
            handle.release()
            raise
        handle.release()
        if self._sent(handle):
            return None
        operation = Operation(handle, outputs, expected)
        operation.received = True
        return operation

    def _receive_oldest(self, deadline: float) -> None:
        """Receive the oldest operation in flight. Its own error stays with it; raises PeerTimeout."""
        operation = self._flying[0]
        while not operation.received:
            try:
                self._receive(operation.handle, operation.outputs, operation.expected, self._slice(deadline))
                operation.received = True
                operation.handle.release()
            except PeerTimeout:
                if self._over(deadline):
                    raise
            except BlsrdmaError as error:
                operation.handle.release()
                operation.fail(error)
        self._flying.popleft()

    def _finish(self, operation: Operation, deadline: float) -> None:
        while not operation.received:
            self._receive_oldest(deadline)
        pause = 0.0
        while not operation.done:
            if self._sent(operation.handle):
                operation.done = True
            elif self._over(deadline):
                raise _not_sent(operation)
            else:
                time.sleep(pause)
                pause = min(pause + 1e-6, 1e-3)

    # --- time

    def _deadline(self, timeout: float | None) -> float:
        return time.monotonic() + (self.timeout if timeout is None else timeout)

    def _slice(self, deadline: float) -> float:
        return max(0.0, min(_SLICE_S, deadline - time.monotonic()))

    def _over(self, deadline: float) -> bool:
        self._refuse_if_ended()
        return time.monotonic() >= deadline

    # --- what nobody waits for

    def _watch(self, operation: Operation) -> None:
        with self._watching:
            self._watched.append(operation)
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._complete_watched, name="blsrdma backend", daemon=True)
                self._watcher.start()

    def _complete_watched(self) -> None:
        idle_at = time.monotonic() + 1.0  # stays a while, for threads are dear
        while True:
            if self._watched:
                idle_at = time.monotonic() + 1.0
                if self.poll(self._watched[0]):
                    self._watched.popleft()
                    continue
            time.sleep(_POLL_S)
            with self._watching:
                if self.ended is not None or (not self._watched and time.monotonic() > idle_at):
                    self._watcher = None
                    return


def _not_sent(operation: Operation) -> PeerTimeout:
    iteration = operation.handle.iteration
    return PeerTimeout(f"all_to_all {iteration}: not all of the input has left this rank", iteration, {})
