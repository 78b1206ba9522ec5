"""How pooled vectors reach the rank that needs them: owners look them up for all samples, and send them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dlrm.collective import Collective

if TYPE_CHECKING:
    from blsrdma import Exchange, Handle
    from dlrm.collective import Delivery
    from dlrm.data.batch import Batch
    from dlrm.placement import Placement
    from dlrm.tables import Tables


class Flight:
    """The pooled vectors of one iteration on their way to this rank."""

    def __init__(self, handle: Handle | Delivery, samples: int, widths: list[tuple[int, int]]) -> None:
        self._handle = handle
        self._shapes = [(samples, tables, dim) for tables, dim in widths]
        self.iteration: int = handle.iteration

    def ready(self) -> bool:
        """Whether every rank's vectors are here."""
        return bool(self._handle.ready())

    def wait(self, timeout: float | None = None) -> list[Tensor]:
        """One view [n, tables of it, dim] per owner, in table order; valid until `release`."""
        return [part.view(shape) for part, shape in zip(self._handle.wait(timeout), self._shapes, strict=True)]

    def release(self) -> None:
        """Give the views up, so that their windows are used again."""
        self._handle.release()


class AlltoallvRoute:
    """Iterations over an Exchange: `begin`, `lookup`, `post`, in this order, once for each batch.

    What is posted belongs to the exchange until it is sent, so lookups that want memory get it from a ring of buffers,
    which grows to lag + 2 of them, and further where messages take longer to leave.
    """

    def __init__(self, exchange: Exchange | Collective, tables: Tables, placement: Placement, batch_size: int) -> None:
        self._exchange = exchange
        self.tables = tables
        self._placement = placement
        self._elements = batch_size * len(tables.owned) * tables.dim
        self._ring: list[tuple[Tensor, Handle | Delivery | None]] = []
        self._lent = False  # the last buffer of the ring, since the latest post

    @property
    def lag(self) -> int:
        """The lag bound, in iterations."""
        return int(self._exchange.lag)

    @property
    def iteration(self) -> int:
        """The iteration that `begin` begins next."""
        return int(self._exchange.iteration)

    def begin(self) -> int:
        """Wait until the lag bound allows the next iteration, and return its number."""
        return int(self._exchange.begin())

    def buffer(self) -> Tensor:
        """Memory for the next lookup."""
        self._lent = True
        for position, (memory, handle) in enumerate(self._ring):
            if handle is None or handle.sent():
                self._ring.append(self._ring.pop(position))
                self._ring[-1] = (memory, None)
                return memory
        self._ring.append((torch.empty(self._elements), None))
        return self._ring[-1][0]

    def lookup(self, batch: Batch) -> Tensor:
        """The pooled vectors of this rank's tables for the whole batch, [B, tables, dim]."""
        return self.tables.lookup(batch, self.buffer)

    def post(self, pooled: Tensor) -> Flight:
        """Send the latest lookup: to each rank the rows of its samples."""
        return self.send(pooled, [len(some) for some in self._placement.samples(pooled.shape[0])])

    def send(self, pooled: Tensor, samples: list[int]) -> Flight:
        """Send the latest lookup [sum of samples, tables, dim]: the first samples[0] to rank 0, and so on."""
        row = pooled.shape[1] * pooled.shape[2]
        handle = self._post(pooled.view(-1), [count * row for count in samples], samples[self._exchange.rank])
        if self._lent:
            self._ring[-1] = (self._ring[-1][0], handle)
            self._lent = False
        widths = [(len(tables), self.tables.dim) for tables in self._placement.tables]
        return Flight(handle, samples[self._exchange.rank], widths)

    def _post(self, vectors: Tensor, counts: list[int], mine: int) -> Handle | Delivery:
        if isinstance(self._exchange, Collective):
            expected = [mine * len(tables) * self.tables.dim for tables in self._placement.tables]
            return self._exchange.post(vectors, counts, expected=expected)
        return self._exchange.post(vectors, counts)
