"""Pooled lookups in tables that are spread over the ranks, without a collective: `Lookup`.

    with Lookup({3: my_rows, 5: other_rows}, lag=4) as lookup:      # under torchrun; each rank names the tables it owns
        asked = deque()
        for batch in batches:
            if len(asked) > lookup.lag:
                use(*asked.popleft().wait())                        # float32 [bags, dim] for each table asked
            asked.append(lookup.ask([Bags(3, indices, offsets), Bags(9, ...)]))

A rank asks the owners of the tables it needs, and nobody else waits for it: ranks need not make the same number of
requests, nor at the same time. Others are answered apart from the rank's own loop, by a thread that needs no GIL.

mode "put": requests and responses are put into windows (blsrdma.request_windows); the owner pools; its tables may lie
in GPU memory, and are pooled there. mode "get": the tables lie in registered memory, and the requester reads the rows
it needs by one-sided loads or gets and pools them itself; the owner's processor takes no part. Either way a bag is
pooled wholly at one place by the same arithmetic, in index order: the bits are the same, and are those of
torch.nn.functional.embedding_bag on float32.

One thread at a time calls a Lookup and its handles. Waits release the GIL.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from blsrdma import request_windows
from blsrdma.asked import Asked, places, slices
from blsrdma.errors import (
    BagsError,
    BlsrdmaError,
    ConcurrentUse,
    ExchangeClosed,
    PeerFailed,
    SettingsError,
    VersionError,
)
from blsrdma.fabric import Fabric
from blsrdma.lookup_choice import measure
from blsrdma.lookup_errors import lookup_error, version_error
from blsrdma.lookup_opening import connect, flat, refuse_what_cannot_be
from blsrdma.lookup_settings import LookupSettings
from blsrdma.lookup_store import OwnTables
from blsrdma.lookup_tables import Bags, Rows, TableFacts, address, describe_bags
from blsrdma.peers import arena_facts, whoami
from blsrdma.rendezvous import Rendezvous, environment_ranks, store_from_environment
from blsrdma.settings import format_size, timeout_ns
from blsrdma.ucx import native

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from torch.distributed import Store

    from blsrdma.asked import Out
    from blsrdma.lookup_choice import Choice
    from blsrdma.lookup_tables import Array

log = logging.getLogger("blsrdma")

_CLOSED, _ERRED, _BEREAVED = 1, 2, 3  # as in native/layout.h
MOST_VERSIONS = 1 << 62
PARTING_SECONDS = 0.2  # for a GPU to be found at rest, beyond close_timeout

_open: weakref.WeakSet[Lookup] = weakref.WeakSet()
_quarantine: list[Any] = []  # what a peer may still write into: kept until the process ends


class Lookup:
    """Bags of any rank's tables, pooled.

    Parameters:
        tables: the tables that this rank owns, by number: float32 or float16 matrices [rows, dim], or `Rows`. They are
            used where they lie in put mode, and must not change; in get mode they are copied into registered memory.
            load_tables() replaces them. In put mode some or all may be in the memory of one GPU: CUDA tensors, or
            whatever has __cuda_array_interface__. Then `timeout` is also how long that GPU may take for a request.
        store, rank, world_size, name: as for an Exchange; a Lookup and an Exchange of one name must not share a store.
        version: of these tables; the same on every rank. See load_tables.
        lag: asks of this rank that may be incomplete at a time, less one.
        mode, request_bytes, response_bytes, pooling, serve, serve_share, on_peer_failure, default_row: see
            blsrdma.lookup_settings; timeout, close_timeout, keepalive, direct, checksum, memory_limit: see
            blsrdma.settings.

    Raises, on every rank well before the deadline: SettingsError for bad values, or a table with two owners;
    MemoryLimitExceeded before anything is allocated; SettingsMismatch; RendezvousError; for tables in GPU memory
    CompileError and GpuError.
    """

    def __init__(
        self,
        tables: Mapping[int, Rows | Array],
        store: Store | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        *,
        name: str = "lookup",
        version: int = 0,
        **settings: Any,
    ) -> None:
        self._closed = True  # until it is open
        self._forked = False
        if rank is None or world_size is None:
            rank, world_size = environment_ranks()
        self.rank, self.world_size, self.name = rank, world_size, name
        refusal: SettingsError | None = None
        try:
            self.settings = LookupSettings.resolve(**settings)
        except SettingsError as error:
            refusal, self.settings = error, LookupSettings.resolve({})
        common = self.settings.common
        if store is None:
            store = store_from_environment(rank, world_size, common.timeout)
        self._store = store
        rendezvous = Rendezvous(store, name, rank, world_size, common.timeout)
        self._in_flight: dict[int, Asked] = {}
        self._outgoing: int | None = None  # the place of a version that may still be asked for
        try:
            if refusal is not None:
                raise refusal
            if not 0 <= version < MOST_VERSIONS:
                raise SettingsError(f"version = {version}: must be from 0 to 2^62 - 1")
            own = self._own = OwnTables(tables, rank)
            places = (1 + self.settings.updates) if self.settings.mode != "put" else 0
            self._geometry = request_windows.geometries(
                world_size, common.lag, self.settings.request_bytes, self.settings.response_bytes
            )
            refuse_what_cannot_be(self.settings, self._geometry, own, places, world_size)
            self._timeout_ns = timeout_ns(common.timeout)
            self._mean = self.settings.pooling == "mean"
            self._fabric = Fabric.of_process()
            self._arenas = [self._fabric.allocate(each.arena_bytes) for each in self._geometry]
            if places:
                self._arenas.append(self._fabric.allocate(own.arena_bytes(places)))
            own.open(self._arenas[2] if places else None)
            if own.gpu is not None:
                widest = max(facts.dim for facts in own.facts)
                own.gpu.open(self.settings.request_bytes, self.settings.response_bytes, widest, common.timeout)
                own.settle(common.timeout)
        except BaseException as error:
            rendezvous.report(error)
            raise
        mine = [{"table": t.table, "rows": t.rows, "dim": t.dim, "format": t.format, "offset": t.offset, "gpu": t.gpu}
                for t in own.facts]  # fmt: skip
        blob = whoami(self._fabric) | {"tables": mine, "arenas": [arena_facts(each) for each in self._arenas]}
        met = rendezvous.meet(self.settings.agreed() | {"version": version}, flat(blob))
        self._epoch = met.epoch
        opened = connect(rendezvous, met, self._fabric, self._arenas, own, self._geometry, rank, name, self.settings,
                         version, _quarantine)  # fmt: skip
        self._core, self._tables, self._neighbours = opened.core, opened.tables, opened.neighbours
        self._numbers = {facts.table: number for number, facts in enumerate(self._tables)}
        self._by_number = {facts.table: facts for facts in self._tables}
        self._closed = False
        _open.add(self)
        self._choices: list[Choice] = []
        self._tried = 0
        if self.settings.mode == "auto" and self.settings.serve == "thread":
            self._choose()
        log.info(
            "lookup %r: rank %d of %d, lag %d, mode %s, %d tables, %d of them here%s: %s registered; kernel %s",
            name, rank, world_size, self.lag, self.settings.mode, len(self.tables), len(own.facts),
            f" ({len(own.gpu.numbers)} on GPU {own.gpu.device})" if own.gpu else "", format_size(self.memory_bytes),
            native.pool_instructions(),
        )  # fmt: skip

    # --- what it is

    @property
    def lag(self) -> int:
        """Asks that may be incomplete when another one is made."""
        return self.settings.common.lag

    @property
    def memory_bytes(self) -> int:
        """Registered memory of this rank, in bytes."""
        return int(sum(arena.size for arena in self._arenas))

    @property
    def tables(self) -> tuple[TableFacts, ...]:
        """All ranks' tables, in the order of their numbers."""
        return tuple(self._tables)

    @property
    def version(self) -> int:
        """Of the tables that the newest ask was of."""
        self._usable()
        return self._core.version

    # --- the loop

    def ask(
        self, bags: Sequence[Bags], out: Out | Sequence[Out | None] | None = None, timeout: float | None = None
    ) -> Asked:
        """Ask for bags to be pooled, of this rank's own tables or of others'. Returns their handle.

        Parameters:
            bags: see Bags. Their memory belongs to the lookup until the handle is complete.
            out: where the pooled rows go. One array float32 [bags, tables asked, dim], where all have as many bags and
                as wide rows (the fastest way); or for each table an array [bags, dim] whose rows are contiguous, or
                None for memory of its own. None: memory of its own for each.
            timeout: seconds, for the lag bound.

        Waits only while lag + 1 asks are incomplete. Nothing has been asked when it raises: BagsError naming table,
        position and value; PeerTimeout. A failed owner is told by the handle's wait(), and so is a GPU that fails to
        pool this rank's own tables (GpuError).
        """
        self._usable()
        result: Any = out
        whole = out is not None and not isinstance(out, Sequence)
        outcome, number = -1, 0
        if whole:
            outcome, number = self._core.ask_into(bags, out, self._numbers, self._mean, self._ns(timeout))
        if outcome == -1:
            apart: Any = slices(bags, out) if whole else out
            placed = places(bags, apart, self._by_number)
            parts = [
                (self._numbers[each.table], self._mean, *describe_bags(each), place.address, place.stride)
                for each, place in zip(bags, placed, strict=True)
            ]
            outcome, number = self._core.ask(parts, self._ns(timeout))
            result = out if whole else [place.result for place in placed]
        if outcome:
            raise self._error(outcome)
        if len(self._in_flight) > self.lag:
            for old in [asked for asked in self._in_flight.values() if asked.dropped]:
                self._forget(old)
        if self._outgoing is not None:
            self._drop_outgoing()
        asked = self._in_flight[number] = Asked(self, number, self._core.version, bags, result)
        return asked

    def keep(self, table: int, rows: Array, timeout: float | None = None) -> None:
        """Get rows of a table of another rank now, and keep them here: asks find them, and their owner is spared.

        Of use with fetch "rows", for rows that are asked for often (see hot_rows); else it does nothing. `rows`: int64
        [n], on any rank any rows. Raises BagsError for a row that the table does not have; PeerTimeout, PeerFailed.
        """
        self._usable()
        numbers = np.ascontiguousarray(rows, dtype=np.int64)
        if table not in self._numbers:
            raise BagsError(f"table {table}: no rank has it", table)
        outcome = self._core.keep(self._numbers[table], address(numbers), numbers.size, self._ns(timeout))
        if outcome:
            raise self._error(outcome)

    def load_tables(self, version: int, tables: Mapping[int, Rows | Array], timeout: float | None = None) -> None:
        """Put another version of this rank's tables in the place of the one it has, without stopping anybody.

        Every rank that owns tables calls it, at any time, with the same rising `version` and all tables that it owns,
        with the same rows, dim and format. Asks go over to it when all owners have it: each is answered wholly from one
        version, and `Asked.version` tells which. Cached rows are forgotten then, and hot rows got anew when they are
        asked for.

        Memory: an owner has two versions until every rank has called its lookup since the last owner loaded the new
        one, and its asks before that are complete; then the old one is let go. In put mode that is the caller's memory,
        which must not change until then; in get and auto mode rows are copied, into memory that the setting `updates`
        provides for.

        Waits only while the version before the present one is still in use; and for what writes rows in GPU memory, on
        the stream that their library names. A table stays in CPU memory, or on its GPU. Raises VersionError, also where
        another owner has loaded another version; PeerTimeout naming the ranks that need the old one; GpuError where
        that GPU has failed. A rank without tables need not call.
        """
        self._usable()
        rows = self._own.alike(tables, self.rank)
        if not rows:
            return
        newest = max(self._core.loaded, self._core.version)
        if isinstance(version, bool) or not newest < version < MOST_VERSIONS:
            raise VersionError(f"version {version} cannot follow version {newest}: versions rise, up to 2^62 - 1")
        if self.settings.mode != "put" and not self.settings.updates:
            raise VersionError(f"mode {self.settings.mode} has no room for another version: set updates")
        self._own.settle(self.settings.common.timeout if timeout is None else timeout)
        outcome, place = self._core.make_room(version, self._ns(timeout))
        if outcome:
            raise version_error(self._error(outcome), self._core, self.name, version, self._state)
        self._own.store(place, rows)
        if not self._core.load(version, place, [self._own.address(place, each.table) for each in self._tables]):
            raise ConcurrentUse(f"lookup {self.name!r}: another thread is in a call on it; one thread at a time")
        self._outgoing = 1 - place

    def finish(self, timeout: float | None = None) -> None:
        """This rank asks no more: serve the others until all of them say the same, or have left or failed.

        Called at the end of a `with` block that ends well. Raises PeerTimeout naming the ranks that still ask.
        """
        self._usable()
        outcome = self._core.finish(self._ns(timeout))
        if outcome:
            raise self._error(outcome)

    # --- what it did

    def stats(self) -> dict[str, Any]:
        """What happened so far: `asks`, `version`, `memory_bytes`, and `peers`, one entry per rank:

        - path: self, direct (stores into mapped memory), put (UCX), read (get mode); and transport, UCX's choice for
          puts; of reads mapped (loads), cma (process_vm_readv, where its memory cannot be mapped), or ucp_get and
          what UCX gets by;
        - asked of it: requests, request_bytes, response_bytes, bags, rows, wait_ns (of waits in which it was missing),
          degraded (bags that were answered with the default row); and with fetch "rows": rows fetched, and not fetched
          because they were kept, cached or repeated;
        - gpu_tables: how many of its tables lie in its GPU's memory;
        - read: bags that were read there; chosen, in mode auto: what is done, in words, for which of its tables;
        - served to it: requests, bags, rows, refused, busy_ns.
        """
        self._usable()
        peers = []
        for q in range(self.world_size):
            asked = ("requests", "request_bytes", "response_bytes", "bags", "rows", "wait_ns", "degraded", "fetched",
                     "kept", "cached", "repeated", "read")  # fmt: skip
            served = ("requests", "bags", "rows", "refused", "busy_ns")
            path = "self" if q == self.rank else self._path(q)
            peers.append(
                {"rank": q, "path": path, "transport": self._transport(q, path),
                 "asked": dict(zip(asked, self._core.stats(q), strict=True)),
                 "served": dict(zip(served, self._core.served(q), strict=True)),
                 "gpu_tables": sum(facts.gpu for facts in self._tables if facts.owner == q),
                 "chosen": {str(each): list(each.tables) for each in self._choices if each.owner == q}}
            )  # fmt: skip
        return {
            "asks": self._core.next - self._tried,
            "version": self._core.version,
            "memory_bytes": self.memory_bytes,
            "peers": peers,
        }

    # --- the end

    def close(self, error: BaseException | None = None) -> None:
        """Leave. Peers that still ask this rank get PeerLeft, or PeerFailed with the text of `error`. Returns within
        `close_timeout`: peers that have not closed by then keep this rank's windows alive. Idempotent."""
        if self._closed:
            return
        self._closed = True
        _open.discard(self)
        if os.getpid() != self._fabric.pid:
            return  # a fork's child: nothing here is its own
        code, blamed, text = _CLOSED, 0, "it closed the lookup"
        if isinstance(error, PeerFailed):
            code, blamed, text = _BEREAVED, error.rank, str(error)
        elif error is not None:
            code, text = _ERRED, f"{type(error).__name__}: {error}"
        short = text.encode()[: native.FAREWELL_TEXT_BYTES].decode(errors="ignore")
        end = time.monotonic() + self.settings.common.close_timeout
        quiet = self._core.close(code, blamed, short, timeout_ns(self.settings.common.close_timeout))
        if self._own.gpu is not None and not self._own.gpu.close(max(PARTING_SECONDS, end - time.monotonic())):
            log.info("lookup %r: GPU %d still has work on its tables, or has failed; they are kept", self.name,
                     self._own.gpu.device)  # fmt: skip
            _quarantine.append(self._own)
        if not quiet:
            log.info("lookup %r: peers had not closed after %g s; its windows are kept", self.name,
                     self.settings.common.close_timeout)  # fmt: skip
            _quarantine.append((self._core, self._arenas, self._fabric, self._own))
        self._in_flight = {}

    def __enter__(self) -> Lookup:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and not self._closed:
                self.finish()
        except BaseException as late:
            error = late
            raise
        finally:
            self.close(error)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"lag {self.lag}, mode {self.settings.mode}"
        return f"<Lookup {self.name!r}: rank {self.rank} of {self.world_size}, {state}>"

    # --- inside

    def _choose(self) -> None:
        """Measure both ways, and say what was chosen."""
        self._choices = list(measure(self._core, self._tables, self.rank, self._timeout_ns))
        self._tried = self._core.next
        self._core.forget_stats()
        for each in self._choices:
            log.info(
                "lookup %r: rank %d, tables %s of rank %d: %s; a bag of n rows costs %.0f + %.1f n ns read, "
                "%.0f + %.1f n asked for", self.name, self.rank, ", ".join(map(str, each.tables)), each.owner, each,
                *each.costs,
            )  # fmt: skip

    def _transport(self, peer: int, path: str) -> str:
        if path == "read":
            if self._core.gets(peer):
                return f"ucp_get ({self._core.transport(peer)})"
            return "mapped" if self._core.mapped(peer) else "cma"
        return self._core.transport(peer) if path == "put" else ""

    def _path(self, peer: int) -> str:
        if self._core.readable(peer):
            return "read"
        return "direct" if self._core.direct(peer) else "put"

    def _usable(self) -> None:
        if self._forked:
            raise BlsrdmaError(
                f"lookup {self.name!r} was made before this process was forked; only the parent can use it"
            )
        if self._closed:
            raise ExchangeClosed(f"lookup {self.name!r} is closed")

    def _ns(self, timeout: float | None) -> int:
        return self._timeout_ns if timeout is None else timeout_ns(timeout)

    def _drop_outgoing(self) -> None:
        if self._outgoing is not None and self._core.retire_version():
            self._own.drop(self._outgoing)
            self._outgoing = None

    def _forget(self, asked: Asked) -> None:
        """The core needs this ask no more, if it is complete."""
        if not self._closed and self._core.ready(asked.number):
            self._core.forget(asked.number)
            self._in_flight.pop(asked.number, None)

    def _state(self, peer: int) -> str:
        return self._neighbours.state(peer, self._core.silence_ns(peer))

    def _error(self, outcome: int) -> BlsrdmaError:
        return lookup_error(outcome, self._core, self.name, self.rank, self._tables, self._state)


def _forked() -> None:
    for lookup in list(_open):
        lookup._forked = True


os.register_at_fork(after_in_child=_forked)


@atexit.register
def _close_what_is_open() -> None:
    for lookup in [each for each in _open if each._fabric.pid == os.getpid()]:
        log.warning("lookup %r was not closed before the interpreter ended", lookup.name)
        lookup.close(BlsrdmaError("the interpreter ended without close()"))
