"""The exchange of a run where it is not blsrdma's (--dist-backend): all-to-alls of torch.distributed or of MPI.

`Collective` has as much of the interface of a blsrdma.Exchange as an engine needs, so that the same engine runs over
both and a comparison is one flag. It does what one would write by hand for such a library: each iteration is one
non-blocking operation, lag + 1 of them are in flight, and where sizes are known to the receiver they are not sent.
"""

from __future__ import annotations

import time
from collections import deque
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dlrm.errors import CollectiveFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dlrm.transports import Pending, Transport

WINDOW_BYTES = 1 << 20  # of a message of `collect`; no limit here


class Delivery:
    """One iteration, from its post until its messages have been used. `with` waits, and gives the messages."""

    def __init__(
        self, collective: Collective, iteration: int, pending: Pending, send: Tensor, out: Tensor, expected: list[int]
    ) -> None:
        self.iteration = iteration
        self._collective, self._pending = collective, pending
        self._send, self._out = send, out  # in use until it is complete
        self._bounds = [0, *accumulate(expected)]
        self._numpy = False

    def ready(self) -> bool:
        """Whether it is complete, so that wait() need not wait."""
        with self._collective.named(self.iteration):
            return self._pending.done()

    sent = ready  # a collective does not tell them apart

    def wait(self, timeout: float | None = None) -> list[Any]:
        """The messages, one from each rank. Raises CollectiveFailed, also when nothing has come by the deadline."""
        self._collective.finish(self, timeout)
        parts = [self._out[start:end] for start, end in pairwise(self._bounds)]
        return [part.numpy() for part in parts] if self._numpy else parts

    def release(self) -> None:
        """The messages are not wanted any more."""

    def __enter__(self) -> list[Any]:
        return self.wait()

    def __exit__(self, *_: object) -> None:
        self.release()


class Collective:
    """Iterations of all-to-all over a transport, of which each rank makes the same ones in the same order."""

    def __init__(self, transport: Transport, lag: int = 0, timeout: float = 60.0) -> None:
        self.rank, self.world_size = transport.rank, transport.ranks
        self.lag, self.window_bytes = lag, WINDOW_BYTES
        self._transport, self._timeout = transport, timeout
        self._flying: deque[Delivery] = deque()
        self._bytes = [0] * self.world_size
        self.iteration = 0

    def begin(self) -> int:
        """Wait until iteration i - lag - 1 is complete; i."""
        while self._flying and self._flying[0].iteration < self.iteration - self.lag:
            self.finish(self._flying[0])
        return self.iteration

    def post(
        self, send: NDArray[Any] | Tensor, counts: Sequence[int] | None = None, *, expected: list[int] | None = None
    ) -> Delivery:
        """Start the next iteration: counts[q] items of the vector `send` go to rank q (None: equal parts).

        `expected`: items that come from each rank; where it is not known (None), sizes are exchanged first.
        """
        self.begin()
        data = send if isinstance(send, Tensor) else torch.from_numpy(np.require(send, requirements=("C", "W")))
        ranks = self.world_size
        parts = [len(data) // ranks] * ranks if counts is None else list(counts)
        with self.named(self.iteration):
            if expected is None:
                sizes = torch.empty(ranks, dtype=torch.int64)
                self._transport.start(sizes, [1] * ranks, torch.tensor(parts), [1] * ranks).wait(self._timeout)
                expected = sizes.tolist()
            out = torch.empty(sum(expected), dtype=data.dtype)
            pending = self._transport.start(out, expected, data, parts)
        delivery = Delivery(self, self.iteration, pending, data, out, expected)
        delivery._numpy = not isinstance(send, Tensor)
        self._flying.append(delivery)
        self.iteration += 1
        for q, part in enumerate(parts):
            self._bytes[q] += part * data.element_size()
        return delivery

    def finish(self, delivery: Delivery, timeout: float | None = None) -> None:
        """Wait until it is complete."""
        with self.named(delivery.iteration):
            delivery._pending.wait(self._timeout if timeout is None else timeout)
        while self._flying and self._flying[0].ready():
            self._flying.popleft()

    def named(self, iteration: int) -> _Named:
        """A block whose failure becomes CollectiveFailed, with the library's and the iteration's names."""
        return _Named(f"{self._transport.name}, rank {self.rank}, iteration {iteration}")

    def stats(self) -> dict[str, Any]:
        """As Exchange.stats(): what went where. A collective does not tell whom it waited for, nor who was ahead."""
        name = self._transport.name
        nothing = {"messages": self.iteration, "waits": 0, "wait_ns": 0, "wait_max_ns": 0, "last": 0}
        peers = [{"rank": q, "path": name, "transport": name, "bytes": n} | nothing for q, n in enumerate(self._bytes)]
        return {"iterations": self.iteration, "memory_bytes": 0, "max_lead": 0, "leads": [], "peers": peers}


class _Named:
    def __init__(self, what: str) -> None:
        self._what = what
        self._began = time.monotonic()

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception):
            after = time.monotonic() - self._began
            text = " ".join(str(error).split()) or type(error).__name__
            raise CollectiveFailed(f"{self._what}: failed after {after:.1f} s: {text}") from error
