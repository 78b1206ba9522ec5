"""The bounded-lag all-to-all: `Exchange`.

    with Exchange(lag=3, window_bytes=1 << 16) as exchange:         # under torchrun, on every rank
        handles = deque()
        for batch in batches:
            exchange.begin()                                        # waits at the lag bound
            handles.append(exchange.post(rows_for_everyone(batch), counts))
            if len(handles) > exchange.lag:
                with handles.popleft() as received:                 # waits, then frees the windows at the end
                    use(received[0], received[1], ...)              # one view per source rank, no copy

One thread at a time calls an Exchange and its handles. Waits release the GIL.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from blsrdma import hosts, launchers
from blsrdma.errors import (
    BlsrdmaError,
    ExchangeClosed,
    MemoryLimitExceeded,
    PeerFailed,
    SettingsError,
)
from blsrdma.fabric import Fabric
from blsrdma.handle import refuse_over
from blsrdma.outcomes import typed_error
from blsrdma.rendezvous import Rendezvous, Round, environment_ranks, store_from_environment
from blsrdma.settings import Settings, default_memory_limit, format_size, timeout_ns
from blsrdma.trace import Trace
from blsrdma.ucx import native, version
from blsrdma.windows import LINE_BYTES, WindowGeometry, windows_needed

if TYPE_CHECKING:
    from types import TracebackType

    from torch.distributed import Store

log = logging.getLogger("blsrdma")

# Farewell codes; native/layout.h has them too.
_CLOSED, _ERRED, _BEREAVED = 1, 2, 3

_open: weakref.WeakSet[Exchange] = weakref.WeakSet()
_quarantine: list[Any] = []  # what a peer may still write into: kept until the process ends


class Exchange(native.Front):
    """An all-to-all of messages of any sizes, bounded-lag synchronous.

    Its loop, begin() and post(), is native (native/front.cpp): help(Exchange.post) says how they are called.

    Parameters:
        store: a torch.distributed Store that all ranks share; None: the one that the launcher's environment names.
        rank, world_size: None: as the launcher says, see blsrdma.launchers.
        name: exchanges that use one store at the same time need different names.
        lag, window_bytes, timeout, close_timeout, keepalive, direct, copy_self, checksum, trace, memory_limit:
            see blsrdma.settings; None means not given: the environment's BLSRDMA_* or the default.

    Raises, on every rank well before the deadline if one of them is at fault: SettingsError for bad values,
    MemoryLimitExceeded before anything is allocated, SettingsMismatch when ranks disagree, RendezvousError when ranks
    are missing or have failed.
    """

    def __init__(
        self,
        store: Store | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        *,
        name: str = "exchange",
        lag: int | None = None,
        window_bytes: int | None = None,
        timeout: float | None = None,
        close_timeout: float | None = None,
        keepalive: float | None = None,
        direct: bool | None = None,
        copy_self: bool | None = None,
        checksum: bool | None = None,
        trace: str | None = None,
        memory_limit: int | None = None,
        _windows: int | None = None,
        _guard_bytes: int = 0,
        _device_bytes: int = 0,
    ) -> None:
        # _windows breaks the reuse rule and _guard_bytes puts untouched bytes around windows: for the tests of both.
        # _device_bytes: the size of the windows of GPU memory that go with those here (blsrdma.gpu.exchange).
        self._closed = True  # until it is open
        self._quiet = False  # closed, and no peer can write here or be written to any more
        self._device_bytes = _device_bytes
        self._failure: BlsrdmaError | None = None
        if rank is None or world_size is None:
            rank, world_size = environment_ranks()
        self.rank, self.world_size, self.name = rank, world_size, name
        refusal: SettingsError | None = None
        try:
            self.settings = Settings.resolve(
                lag=lag, window_bytes=window_bytes, timeout=timeout, close_timeout=close_timeout, keepalive=keepalive,
                direct=direct, copy_self=copy_self, checksum=checksum, trace=trace,
                memory_limit=memory_limit,
            )  # fmt: skip
        except SettingsError as error:
            refusal, self.settings = error, Settings()
        # What this rank refuses it reports, so that the others, who may be waiting for it already, end too.
        if store is None:
            store = store_from_environment(rank, world_size, self.settings.timeout)
        self._store = store  # rank 0 may host it: it must not end while others still ask it
        rendezvous = Rendezvous(store, name, rank, world_size, self.settings.timeout)
        try:
            if refusal is not None:
                raise refusal
            windows = _windows or windows_needed(self.settings.lag)
            self.geometry = WindowGeometry(
                world_size, windows, self.settings.window_bytes, self.settings.copy_self, _guard_bytes
            )
            self._refuse_over_limit()
            self._timeout_ns = timeout_ns(self.settings.timeout)
            recorder = Trace(self.settings.trace, name, rank, world_size, self.lag) if self.settings.trace else None
            self._fabric = Fabric.of_process()
            self._arena = self._fabric.allocate(self.geometry.arena_bytes)
        except BaseException as error:
            rendezvous.report(error)
            raise
        self._bytes: np.ndarray[Any, np.dtype[np.uint8]] = self._arena.array()
        token = secrets.token_bytes(LINE_BYTES)
        self._bytes[:LINE_BYTES] = np.frombuffer(token, np.uint8)
        met = rendezvous.meet(self._agreed(), self._blob(token))
        self._core = self._connect(rendezvous, met)
        super().__init__(self._core, self._bytes, self._timeout_ns, self.settings.copy_self)
        self._trace = recorder
        if recorder is not None:
            self._span = recorder.call
        self._closed = False
        _open.add(self)
        log.info(
            "exchange %r: rank %d of %d, lag %d, %d windows of %s from each of %d sources: %s registered; UCX %s",
            name, rank, world_size, self.lag, self.geometry.windows, format_size(self.window_bytes),
            self.geometry.sources, format_size(self.memory_bytes), version,
        )  # fmt: skip
        if log.isEnabledFor(logging.INFO):
            with suppress(PeerFailed):  # somebody has left already: the next call says so
                log.info("exchange %r: rank %d reaches %s", name, rank, self._topology())

    # --- what it is

    @property
    def lag(self) -> int:
        """Iterations this rank may run ahead of the slowest."""
        return self.settings.lag

    @property
    def window_bytes(self) -> int:
        """Messages to other ranks up to this size, in bytes, go into windows; larger ones are pulled."""
        return self.settings.window_bytes

    @property
    def memory_bytes(self) -> int:
        """Registered memory of this rank, in bytes."""
        return self.geometry.arena_bytes

    @property
    def iteration(self) -> int:
        """The number of the next iteration to be posted."""
        self._unfailed()
        return self._core.next

    # --- what it did

    def stats(self) -> dict[str, Any]:
        """What happened so far.

        `iterations` posted; `memory_bytes` of windows; `leads`, where leads[n] is how often this rank was n iterations
        ahead of the slowest when it began one, and `max_lead`, the largest n; `peers`, one entry per rank:

        - path (direct: stores into mapped memory; put: UCX; self) and transport (UCX's choice, for puts);
        - large, how messages larger than a window come from it: read (out of its memory, where it is on this host, the
          system permits that and `direct` is set) or get (UCX);
        - messages and bytes sent to it;
        - waits in which it was behind, wait_ns spent in them until its message came, wait_max_ns the longest, and last,
          how often it was the last to come.
        """
        self._unfailed()
        peers = []
        for q in range(self.world_size):
            messages, sent_bytes, waits, wait_ns, wait_max_ns, last = self._core.stats(q)
            path = "self" if q == self.rank else "direct" if self._core.direct(q) else "put"
            transport = {"self": "", "direct": "mapped", "put": ""}[path] or self._core.transport(q)
            peers.append(
                {"rank": q, "path": path, "transport": transport,
                 "large": "" if q == self.rank else "read" if self._core.reads(q) else "get",
                 "messages": messages, "bytes": sent_bytes,
                 "waits": waits, "wait_ns": wait_ns, "wait_max_ns": wait_max_ns, "last": last}
            )  # fmt: skip
        leads = self._core.leads
        return {
            "iterations": self._core.next,
            "memory_bytes": self.memory_bytes,
            "max_lead": len(leads) - 1,
            "leads": leads,
            "peers": peers,
        }

    # --- the end

    def close(self, error: BaseException | None = None) -> None:
        """Leave. Messages that were posted still arrive; peers that wait for more get PeerLeft, or PeerFailed if an
        `error` is given, with its text. Returns within `close_timeout`: peers that have not closed by then keep this
        rank's windows alive. Idempotent."""
        if self._closed:
            return
        self._closed, self._live = True, False
        _open.discard(self)
        code, blamed, text = _CLOSED, 0, "it closed the exchange"
        if isinstance(error, PeerFailed):
            code, blamed, text = _BEREAVED, error.rank, str(error)
        elif error is not None:
            code, text = _ERRED, f"{type(error).__name__}: {error}"
        if os.getpid() != self._fabric.pid:
            return  # a fork's child: nothing here is its own
        limit = native.FAREWELL_TEXT_BYTES
        short = text.encode()[:limit].decode(errors="ignore")
        try:
            self._quiet = self._core.close(code, blamed, short, timeout_ns(self.settings.close_timeout))
            if not self._quiet:
                log.info("exchange %r: not every peer has said farewell (%g s were allowed): its windows are kept "
                         "until the process ends", self.name, self.settings.close_timeout)  # fmt: skip
                _quarantine.append((self._core, self._arena, self._fabric, self._held()))
        finally:
            self._let_go()
            if self._trace is not None:
                self._trace.write()

    def __enter__(self) -> Exchange:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"lag {self.lag}"
        return f"<Exchange {self.name!r}: rank {self.rank} of {self.world_size}, {state}>"

    # --- inside

    def _topology(self) -> str:
        """How many peers are reached in which way, such as '1 by direct stores, 2 by puts (tcp/eth0)'."""
        ways: dict[str, int] = {}
        for peer in self.stats()["peers"]:
            if peer["path"] != "self":
                way = "direct stores" if peer["path"] == "direct" else f"puts ({peer['transport']})"
                ways[way] = ways.get(way, 0) + 1
        return ", ".join(f"{count} by {way}" for way, count in ways.items()) or "nobody: it is alone"

    def _refuse_over_limit(self) -> None:
        limit = self.settings.memory_limit
        if limit is None:
            limit = default_memory_limit(place.ranks_here() if (place := launchers.find()) else self.world_size)
        self._memory_limit = limit
        need = self.geometry.arena_bytes
        if need > limit:
            raise MemoryLimitExceeded(
                f"windows need {format_size(need)} per rank ({self.geometry.sources} sources x {self.geometry.windows} "
                f"windows of {format_size(self.settings.window_bytes)}); memory_limit is {format_size(limit)}"
            )

    def _agreed(self) -> dict[str, Any]:
        return {
            "lag": self.settings.lag,
            "window_bytes": self.settings.window_bytes,
            "copy_self": self.settings.copy_self,
            "checksum": self.settings.checksum,
            "windows": self.geometry.windows,
            "guard_bytes": self.geometry.guard_bytes,
        }

    def _blob(self, token: bytes) -> dict[str, Any]:
        return {
            "incarnation": self._fabric.incarnation,
            "address": self._fabric.address,
            "rkey": self._arena.packed_rkey(),
            "base": self._arena.address,
            "token": token,
            "host": hosts.host_id(),
            "pid": os.getpid(),
            "began": hosts.started(os.getpid()),
        }

    def _connect(self, rendezvous: Rendezvous, met: Round) -> native.Exchange:
        here = [blob["host"] == met.blobs[self.rank]["host"] for blob in met.blobs]
        self._processes = [(blob["pid"], blob["began"]) if here[q] else None for q, blob in enumerate(met.blobs)]
        # Two ranks that spin on one core make each other wait for a whole time slice.
        spins = 2000 if sum(here) <= hosts.cores() else 0
        core = native.Exchange(
            self._fabric.native, self._arena, self._native_geometry(), self.rank, self.settings.lag, met.epoch,
            self.settings.copy_self, self.settings.direct, self.settings.checksum,
            timeout_ns(self.settings.keepalive), spins, 1000, self._device_bytes,
        )  # fmt: skip
        error: BaseException | None = None
        try:
            peers, pidfds = [], []
            for q, blob in enumerate(met.blobs):
                pidfds.append(hosts.open_pidfd(blob["pid"], blob["began"]) if here[q] and q != self.rank else -1)
                if q != self.rank:
                    pid = blob["pid"] if here[q] else 0
                    peers.append((q, blob["address"], blob["rkey"], blob["base"], blob["token"], pid))
            core.connect(peers, pidfds, self._timeout_ns)
        except BaseException as failed:
            error = failed
        try:
            rendezvous.confirm(error)
        except BlsrdmaError:
            if not core.close(_ERRED, 0, "it could not connect", timeout_ns(1.0)):
                _quarantine.append((core, self._arena, self._fabric))
            raise
        return core

    def _native_geometry(self) -> native.Geometry:
        geometry = native.Geometry()
        for field in ("ranks", "windows", "window_bytes", "window_stride", "control_offset", "windows_offset",
                      "staging_offset", "arena_bytes"):  # fmt: skip
            setattr(geometry, field, getattr(self.geometry, field))
        return geometry

    def _count_large(self, more: int) -> None:
        refuse_over(self._memory_limit, self.memory_bytes, self._large_bytes, more)
        self._large_bytes += more

    def _usable(self) -> None:
        """Raise what makes this exchange unusable (then _live is False); begin, post and wait meet a failure of the
        core by themselves."""
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise ExchangeClosed(f"exchange {self.name!r} is closed")

    def _unfailed(self) -> None:
        self._usable()
        if self._core.failed:
            raise self._error(self._core.why_failed())

    def _state(self, peer: int) -> str:
        """Whether a peer lives, in words."""
        process = self._processes[peer]
        if process is not None:
            return hosts.process_state(*process)
        silence = self._core.silence_ns(peer) / 1e9
        return "alive" if silence < 3 else f"silent for {silence:.0f} s: stopped or unreachable"

    def _error(self, outcome: int) -> BlsrdmaError:
        """The typed error for what the core refused or met. A failure is remembered: every later call meets it too."""
        error = typed_error(outcome, self._core, self.name, self.rank, self.world_size, self._state)
        if isinstance(error, PeerFailed):
            self._failure, self._live = error, False
        return error


def _forked() -> None:
    """In the child of a fork: what the parent's progress thread and peers work on cannot be used here."""
    for exchange in list(_open):
        exchange._failure = BlsrdmaError(
            f"exchange {exchange.name!r} was made before this process was forked; only the parent can use it"
        )
        exchange._live = False


os.register_at_fork(after_in_child=_forked)


@atexit.register
def _close_what_is_open() -> None:
    for exchange in [each for each in _open if each._fabric.pid == os.getpid()]:
        log.warning("exchange %r was not closed before the interpreter ended", exchange.name)
        exchange.close(BlsrdmaError("the interpreter ended without close()"))
