"""The end of what has GPU memory that peers use: at a `with` block's, or, with a warning, at the interpreter's."""

from __future__ import annotations

import atexit
import logging
import os
import weakref
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Self

from blsrdma.errors import BlsrdmaError
from blsrdma.exchange import Exchange

if TYPE_CHECKING:
    from types import TracebackType

log = logging.getLogger("blsrdma")

quarantine: list[Any] = []  # what a device or a peer may still use: kept until the process ends
_open: weakref.WeakSet[Closing] = weakref.WeakSet()


class Closing(ABC):
    """What is closed once. Its Exchange tells the peers, and says whether they have all left."""

    name: str
    _inner: Exchange
    _closed = True  # until it is open

    def _opened(self) -> None:
        self._closed = False
        _open.add(self)

    def close(self, error: BaseException | None = None) -> None:
        """Leave, as Exchange.close. `close_timeout` holds for what this rank's GPU has still to do, and again for the
        peers; what is not done by then is kept until the process ends. Idempotent."""
        if self._closed:
            return
        self._closed = True
        _open.discard(self)
        if os.getpid() == self._inner._fabric.pid:  # else this is a fork's child: nothing here is its own
            self._leave(error)

    @abstractmethod
    def _leave(self, error: BaseException | None) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)


# Registered after the host exchange's own, and so run before it: its close must not come first.
@atexit.register
def _close_what_is_open() -> None:
    for each in [each for each in _open if each._inner._fabric.pid == os.getpid()]:
        log.warning("%r was not closed before the interpreter ended", each)
        each.close(BlsrdmaError("the interpreter ended without close()"))
