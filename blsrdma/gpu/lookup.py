"""Pooled lookups in tables that are spread over the GPUs of a host: `GpuLookup`.

    with GpuLookup({3: my_rows, 5: other_rows}) as lookup:     # under torchrun; each rank names the tables it owns
        for batch in batches:
            lookup.pool([3, 9], bags, out=memory)              # float32 [samples, 2, dim], on the stream

Mode get, in the words of blsrdma.Lookup: the requester's kernel reads rows out of their owners' GPU memory, mapped by
CUDA IPC, and pools them itself, in index order. Owners take no part; nobody waits for anybody. The bits are those of
torch.nn.functional.embedding_bag on the CPU.

Rows cross from GPU to GPU as often as they are looked up; GpuExchange sends pooled vectors, less of them where bags
have many rows, and reaches other hosts. Mode put, and tables that are replaced while they are in use, are not here:
blsrdma.Lookup, in mode put, takes tables in GPU memory.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any

from blsrdma import hosts
from blsrdma.errors import (
    BagsError,
    ExchangeClosed,
    GpuError,
    MemoryLimitExceeded,
    ReadsUnavailable,
    RendezvousError,
    SettingsError,
)
from blsrdma.exchange import Exchange
from blsrdma.gpu.closing import Closing, quarantine
from blsrdma.gpu.device import default_device, open_device, stream_address
from blsrdma.gpu.pooling import GpuTable, PooledLookup
from blsrdma.lookup_tables import TableFacts, address, describe, directory
from blsrdma.rendezvous import Rendezvous, environment_ranks, store_from_environment
from blsrdma.settings import Settings, format_size, timeout_ns
from blsrdma.windows import round_up

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch.distributed import Store

    from blsrdma.gpu.device import Stream
    from blsrdma.gpu.pooling import GpuBags
    from blsrdma.lookup_tables import Array, Matrix, Rows
    from blsrdma.ucx import native

log = logging.getLogger("blsrdma")

ALIGNMENT = 256  # of a table's first row, in bytes
COPY_SECONDS = 600.0  # for all tables to be on the GPU


class GpuLookup(Closing):
    """Bags of any rank's tables, pooled on this rank's GPU.

    Parameters:
        tables: those that this rank owns, by number: matrices [rows, dim] in CPU memory, or `Rows`. They are copied to
            the GPU.
        device: the number of this rank's GPU; None: LOCAL_RANK modulo the GPUs that this process sees.
        mean: divide each bag's sum by its length.
        store, rank, world_size, name, timeout, close_timeout, keepalive: as for an Exchange.

    Raises, on every rank: SettingsError for tables that cannot be; MemoryLimitExceeded before anything is allocated;
    ReadsUnavailable where an owner's GPU memory cannot be read from here; GpuError; RendezvousError.
    """

    def __init__(
        self,
        tables: Mapping[int, Rows | Array],
        store: Store | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        *,
        device: int | None = None,
        mean: bool = False,
        name: str = "gpu-lookup",
        timeout: float | None = None,
        close_timeout: float | None = None,
        keepalive: float | None = None,
    ) -> None:
        if rank is None or world_size is None:
            rank, world_size = environment_ranks()
        self.rank, self.world_size, self.name, self._mean = rank, world_size, name, mean
        refusal: SettingsError | None = None
        try:
            self.settings = Settings.resolve(timeout=timeout, close_timeout=close_timeout, keepalive=keepalive)
        except SettingsError as error:
            refusal, self.settings = error, Settings()
        limit = self.settings.timeout
        if store is None:
            store = store_from_environment(rank, world_size, limit)
        self._memory: native.cuda.Memory | None = None
        self._mappings: dict[int, native.cuda.Mapping] = {}
        self._lookups: dict[tuple[int, ...], PooledLookup] = {}
        meeting = Rendezvous(store, name + "/tables", rank, world_size, limit)
        try:
            if refusal is not None:
                raise refusal
            self.device = default_device(rank) if device is None else device
            self._device = open_device(self.device)
            mine = self._upload(tables)
            handle = self._handle()
        except BaseException as error:
            meeting.report(error)
            raise
        facts = [{"table": t.table, "rows": t.rows, "dim": t.dim, "format": t.format, "offset": t.offset} for t in mine]
        met = meeting.meet({"mean": mean}, {"host": hosts.host_id(), "memory": handle, "tables": facts})
        # Who asks what is only known later: every rank maps every owner's memory, and all hear of it where one cannot.
        trouble: BaseException | None = None
        try:
            self._tables = {each.table: each for each in directory([blob["tables"] for blob in met.blobs])}
            self._map(met.blobs)
        except BaseException as failed:
            trouble = failed
        try:
            meeting.confirm(trouble)
        except RendezvousError:
            if trouble is not None:
                raise trouble from None
            raise
        # It carries nothing but the news of who lives, and, at the end, who reads no more.
        self._inner = Exchange(
            store, rank, world_size, name=name, lag=0, window_bytes=0, timeout=limit, checksum=False, copy_self=False,
            close_timeout=self.settings.close_timeout, keepalive=self.settings.keepalive,
        )  # fmt: skip
        self._opened()
        log.info(
            "lookup %r: rank %d of %d, %d tables, %d of them on GPU %d (%s): %s",
            name, rank, world_size, len(self._tables), len(mine), self.device, self._device.name,
            format_size(self.device_bytes),
        )  # fmt: skip

    # --- what it is

    @property
    def tables(self) -> tuple[TableFacts, ...]:
        """All ranks' tables, in the order of their numbers."""
        return tuple(self._tables[table] for table in sorted(self._tables))

    @property
    def device_bytes(self) -> int:
        """GPU memory of this rank's tables, in bytes."""
        return 0 if self._memory is None else self._memory.size

    # --- the loop

    def pool(self, tables: Sequence[int], bags: GpuBags, out: int, *, stream: Stream = None) -> int:
        """Pool bags of some tables, of any ranks, behind what `stream` holds now; returns a number for `check`.

        Parameters:
            tables: their numbers; all of one dim and row format. The first call with a list of tables prepares it.
            bags: see blsrdma.gpu.pooling.GpuBags; of all these tables, in this order. They must stay until it is done.
            out: the address of float32 [samples, tables, dim] on this rank's GPU.

        Does not wait. Raises BagsError for a table that no rank has; PeerFailed where an owner is known to have died:
        its memory is gone, and reading it would cost this process its GPU. An index that is no row adds nothing, and
        is told by `check`, or by a later call.
        """
        self._usable()
        on = stream_address(stream, self.device)
        return self._lookup(tuple(tables)).launch(bags, [out], [0, bags.samples], on)

    def check(self, tables: Sequence[int], number: int, timeout: float | None = None) -> None:
        """Wait until a call of `pool` is done; raise BagsError where it found an index that is no row."""
        self._usable()
        self._lookup(tuple(tables)).check(number, self.settings.timeout if timeout is None else timeout)

    # --- the end

    def _leave(self, error: BaseException | None) -> None:
        at_rest = False
        try:
            end = monotonic() + self.settings.close_timeout
            at_rest = all(each.idle(max(0.0, end - monotonic())) for each in self._lookups.values())
            if at_rest:
                for each in self._lookups.values():
                    each.close()
                for mapping in self._mappings.values():
                    mapping.close()
        except GpuError as failed:
            error = error or failed
        try:
            self._inner.close(error)
        finally:
            if at_rest and self._inner._quiet:
                with suppress(GpuError):
                    if self._memory is not None:
                        self._memory.close()
            else:
                log.info("lookup %r: its tables may still be read: they are kept until the process ends", self.name)
                quarantine.append((self._memory, self._mappings, self._lookups, self._inner))

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"GPU {self.device}"
        return f"<GpuLookup {self.name!r}: rank {self.rank} of {self.world_size}, {state}>"

    # --- inside

    def _usable(self) -> None:
        if self._closed:
            raise ExchangeClosed(f"lookup {self.name!r} is closed")
        self._inner._unfailed()

    def _upload(self, tables: Mapping[int, Rows | Array]) -> list[TableFacts]:
        """Copy this rank's tables to its GPU, one after another."""
        found: list[tuple[TableFacts, Matrix]] = []
        end = 0
        for table, rows in sorted(tables.items()):
            facts, data = describe(table, self.rank, rows)
            found.append((TableFacts(table, self.rank, facts.rows, facts.dim, facts.format, end), data))
            end += round_up(facts.nbytes, ALIGNMENT)
        if not end:
            return [facts for facts, _ in found]
        if end > (free := self._device.free_bytes):
            raise MemoryLimitExceeded(
                f"tables need {format_size(end)} of GPU {self.device}; {format_size(free)} are free there"
            )
        self._memory = self._device.memory(end)
        for facts, data in found:
            self._device.copy(self._memory.address + facts.offset, address(data), facts.nbytes)
        if not self._device.synchronize(0, timeout_ns(COPY_SECONDS)):
            raise GpuError(f"tables were not on GPU {self.device} after {COPY_SECONDS:g} s")
        return [facts for facts, _ in found]

    def _handle(self) -> bytes:
        """What lets other ranks map this one's tables; b"" if it has none."""
        return b"" if self._memory is None else self._memory.ipc_handle()

    def _map(self, blobs: Sequence[Mapping[str, Any]]) -> None:
        for q, blob in enumerate(blobs):
            if q == self.rank or not blob["memory"]:
                continue
            if blob["host"] != blobs[self.rank]["host"]:
                raise ReadsUnavailable(f"rank {q} is on another host: its GPU's memory cannot be read from here")
            try:
                self._mappings[q] = self._device.map(blob["memory"])
            except GpuError as error:
                raise ReadsUnavailable(f"rank {q}'s GPU memory cannot be read by rank {self.rank}: {error}") from error

    def _lookup(self, tables: tuple[int, ...]) -> PooledLookup:
        if tables not in self._lookups:
            for table in tables:
                if table not in self._tables:
                    raise BagsError(f"table {table}: no rank has it", table)
            facts = [self._tables[table] for table in tables]
            if len({(each.dim, each.format) for each in facts}) != 1:
                raise BagsError(f"tables {list(tables)} are not of one dim and row format", tables[0] if tables else -1)
            resident = [
                GpuTable(each.table, each.rows, self._base(each.owner) + each.offset, mean=self._mean) for each in facts
            ]
            self._lookups[tables] = PooledLookup(self._device, resident, facts[0].dim, facts[0].format)
        return self._lookups[tables]

    def _base(self, owner: int) -> int:
        memory = self._memory if owner == self.rank else self._mappings.get(owner)
        return 0 if memory is None else memory.address
