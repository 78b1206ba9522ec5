"""The inference loop of one rank that asks the owners of tables for its own bags, pair by pair (--exchange put, get).

There is no collective: a rank asks for the bags of its own samples, owners answer apart from their loops (put) or are
not involved (get), and nobody waits for a rank whose rows it does not need. Whether every rank reads the whole batch or
just its own samples makes no difference here.

Tables may be replaced meanwhile: each batch is predicted with one version of all of them, asked for or replicated.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blsrdma import Bags, Rows, request_windows
from blsrdma.errors import PeerTimeout
from dlrm import bags
from dlrm.errors import OptionError
from dlrm.loop import HostLoop, Pending
from dlrm.timeline import clock

if TYPE_CHECKING:
    from collections.abc import Callable

    from blsrdma import Lookup
    from blsrdma.asked import Asked
    from blsrdma.lookup_tables import RowFormat
    from dlrm.data.batch import Batch
    from dlrm.kernels import Kernel
    from dlrm.placement import Placement
    from dlrm.queries import Own
    from dlrm.tables import Tables

    # Asked before every batch: a version that is due, its tables of this rank and those that every rank has; or None.
    Updates = Callable[[], tuple[int, Tables, Tables | None] | None]

# The row formats that a Lookup pools with the same bits as these kernels (tests/lookup/test_pooling.py).
_FORMATS: dict[str, RowFormat] = {
    "torch-fp32": "fp32", "torch-fp16": "fp16", "torch-int8": "int8", "torch-int4": "int4",
}  # fmt: skip


def row_format(kernel: Kernel) -> RowFormat:
    """How a Lookup calls the rows that `kernel` stores. Raises OptionError where it does not know them."""
    if kernel.name not in _FORMATS:
        raise OptionError(f"--table-kernel: {kernel.name} rows go with --exchange alltoallv only")
    return _FORMATS[kernel.name]


def own_tables(tables: Tables, placement: Placement, rank: int) -> dict[int, Rows]:
    """What a rank owns, under the numbers that the asks below use: pieces are counted in the order of their owners.

    Raises OptionError for what the lookups cannot pool.
    """
    format_ = row_format(tables.kernel)
    if tables.pooling == "mean" and placement.divided:
        raise OptionError("--pooling mean of tables that are cut by rows goes with --exchange alltoallv only")
    first = sum(map(len, placement.pieces[:rank]))
    return {first + n: Rows(stored, format_, tables.dim) for n, stored in enumerate(tables.stored())}


def window_sizes(query_bytes: int, placement: Placement, batch_size: int, dim: int) -> dict[str, int]:
    """Settings of a Lookup: windows for the largest request and response. `query_bytes`: of a QueryEngine's queries."""
    heads = (request_windows.PART_HEAD_BYTES + 24) * max(map(len, placement.pieces))
    request = max(query_bytes + heads + request_windows.HEAD_BYTES, request_windows.LEAST_REQUEST_BYTES)
    response = max(placement.largest_message(batch_size, dim), 4 * dim)
    return {"request_bytes": request, "response_bytes": response}


class AskRoute:
    """Asks for the bags of batches; each one's pooled rows go into a buffer of a ring."""

    def __init__(self, lookup: Lookup, tables: Tables, placement: Placement) -> None:
        self.lookup = lookup
        self.tables = tables
        self._pieces = [piece for own in placement.pieces for piece in own]
        ends = [sum(map(len, placement.pieces[: rank + 1])) for rank in range(placement.ranks)]
        self._parts = [slice(end - len(own), end) for end, own in zip(ends, placement.pieces, strict=True)]
        self._free: list[Tensor] = []

    @property
    def lag(self) -> int:
        """Asks that may be incomplete when another one is made."""
        return self.lookup.lag

    def ask(self, batch: Batch) -> AskFlight:
        """Ask for all pieces' bags of the samples `batch`. Indices must have been checked (see `bags`)."""
        asked = []
        for number, piece in enumerate(self._pieces):
            indices, offsets = batch.indices[piece.table], batch.offsets[piece.table]
            scales = None if batch.weights is None else batch.weights[piece.table]
            if piece.rows is not None:
                indices, offsets, scales = bags.within(indices, offsets, scales, piece.rows)
            asked.append(Bags(number, indices, offsets, scales))
        size = batch.size * len(self._pieces) * self.tables.dim
        memory = next((one for one in self._free if one.numel() >= size), None)
        if memory is None:
            memory = torch.empty(size)
        else:
            self._free = [one for one in self._free if one is not memory]
        out = memory[:size].view(batch.size, len(self._pieces), self.tables.dim)
        return AskFlight(self, self.lookup.ask(asked, out), out, memory)

    def parts(self, out: Tensor) -> list[Tensor]:
        """A view [n, tables of it, dim] for each owner."""
        return [out[:, part] for part in self._parts]

    def give_back(self, memory: Tensor) -> None:
        """It is read no more."""
        self._free.append(memory)


class AskFlight:
    """The pooled rows of one batch on their way to this rank."""

    def __init__(self, route: AskRoute, asked: Asked, out: Tensor, memory: Tensor) -> None:
        self._route, self._asked, self._out, self._memory = route, asked, out, memory
        self.version = asked.version  # of the tables

    def ready(self) -> bool:
        """Whether every owner's rows are here."""
        return self._asked.ready()

    def wait(self) -> list[Tensor]:
        """One view [n, tables of it, dim] per owner, in table order; valid until `release`."""
        self._asked.wait()
        return self._route.parts(self._out)

    def release(self) -> None:
        """Give the views up, so that their memory is used again."""
        self._route.give_back(self._memory)


class AskEngine(HostLoop[AskRoute, "Own"]):
    """Runs a rank's own batches."""

    updates: Updates | None = None
    _due: tuple[int, Tables, Tables | None] | None = None  # a version that cannot be loaded yet

    def _update(self) -> None:
        """Load the version that is due, if it can be now: the one before may still be in use at slower ranks."""
        if self.updates is None:
            return
        self._due = self._due or self.updates()
        if self._due is None:
            return
        version, tables, replicated = self._due
        lookup, kept = self._route.lookup, self._finish.replicated
        with suppress(PeerTimeout):
            lookup.load_tables(version, own_tables(tables, self._placement, self._rank), timeout=0.0)
            kept[version] = replicated
            self._due = None
            needed = min([lookup.version, *(pending.version for pending in self._pending)])
            for old in [old for old in kept if old < needed]:
                del kept[old]

    def _started(self, batch: Own) -> Pending:
        self._update()
        timeline = self.timeline
        timeline.before.append(self._watch.lap())
        with timeline.phase("lookup"):
            bags.check(batch.batch, self._route.tables.table_rows, range(self._placement.num_tables))
            flight = self._route.ask(batch.batch)
        timeline.posted.append(clock())
        dense = self._dense.slice(batch.samples)
        with timeline.phase("dense"):
            dense.bottom_of(batch.batch.dense)
        return Pending(flight, dense, batch.batch, flight.version)


def traffic(lookup: Lookup) -> dict[str, Any]:
    """A lookup's statistics as those of an exchange: what `report` shows of both."""
    stats, row = lookup.stats(), lookup.tables[0]  # all are alike
    peers = []
    for peer in stats["peers"]:
        asked, served = peer["asked"], peer["served"]
        if peer["path"] in ("self", "read"):
            carried = asked["rows"] * row.row_bytes
        else:
            carried = asked["request_bytes"] + served["bags"] * row.dim * 4
        peers.append({"rank": peer["rank"], "path": peer["path"], "transport": peer["transport"],
                      "messages": asked["requests"], "wait_ns": asked["wait_ns"], "bytes": carried})  # fmt: skip
    return {"iterations": stats["asks"], "memory_bytes": stats["memory_bytes"], "max_lead": None, "peers": peers}
