"""The bounded-lag all-to-all on windows in GPU memory: `GpuExchange`.

    with GpuExchange(lag=3, window_bytes=1 << 20) as exchange:         # under torchrun, on every rank
        for batch in batches:
            exchange.begin()                                           # waits at the lag bound
            handles.append(exchange.post(rows_for_everyone(batch), counts))  # a CUDA tensor; the host does not wait
            if len(handles) > exchange.lag:
                with handles.popleft() as received:                    # waits for the counters, on the host
                    use(received[0], received[1], ...)                 # CUDA tensors: views of the windows

The loop, its settings and its errors are those of blsrdma.Exchange, which carries the headers and counters in host
memory. What is on the device is ordered by streams: post() sends what the stream has produced when it comes so far,
release() gives windows back when what the stream holds then is done, and work that is launched after wait() finds the
messages. There is no device-wide synchronisation.

A kernel can write its results where they belong, without a copy: see `GpuExchange.place`.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from time import monotonic_ns
from typing import TYPE_CHECKING, Any

import numpy as np

from blsrdma import hosts
from blsrdma.buffers import as_counts, equal_counts
from blsrdma.errors import (
    CountsError,
    GpuError,
    MemoryLimitExceeded,
    MessageTooLarge,
    SettingsError,
    WindowHeld,
)
from blsrdma.exchange import Exchange
from blsrdma.gpu import arrays
from blsrdma.gpu.closing import Closing, quarantine
from blsrdma.gpu.device import default_device, open_device, stream_address
from blsrdma.gpu.handle import GpuHandle, Placement
from blsrdma.rendezvous import Rendezvous, environment_ranks, store_from_environment
from blsrdma.settings import Settings, format_size, timeout_ns
from blsrdma.ucx import native
from blsrdma.windows import round_up, windows_needed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import Store

    from blsrdma.buffers import Counts
    from blsrdma.gpu.device import Stream

log = logging.getLogger("blsrdma")

ALIGNMENT = 256  # of device windows, in bytes: what kernels read fastest


class GpuExchange(Closing):
    """An all-to-all of messages of any sizes up to `window_bytes` in GPU memory, bounded-lag synchronous.

    Parameters:
        device: the number of this rank's GPU; None: LOCAL_RANK modulo the GPUs that this process sees.
        lag, window_bytes, gpu_path, timeout, close_timeout, keepalive, trace, memory_limit: see blsrdma.settings;
            memory_limit is about host memory. Windows of GPU memory must fit in what is free there.
        store, rank, world_size, name: as for Exchange.

    Messages to peers whose GPU memory can be written from here (CUDA IPC: on this host, the same GPU or one that can be
    reached) go there directly; all others are staged through page-locked host memory, and stats() says so.

    Raises what Exchange raises, and GpuError.
    """

    def __init__(
        self,
        store: Store | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        *,
        device: int | None = None,
        name: str = "gpu-exchange",
        lag: int | None = None,
        window_bytes: int | None = None,
        gpu_path: str | None = None,
        timeout: float | None = None,
        close_timeout: float | None = None,
        keepalive: float | None = None,
        trace: str | None = None,
        memory_limit: int | None = None,
    ) -> None:
        if rank is None or world_size is None:
            rank, world_size = environment_ranks()
        self.rank, self.world_size, self.name = rank, world_size, name
        refusal: SettingsError | None = None
        try:
            self.settings = Settings.resolve(
                lag=lag, window_bytes=window_bytes, gpu_path=gpu_path, timeout=timeout, close_timeout=close_timeout,
                keepalive=keepalive, trace=trace, memory_limit=memory_limit,
            )  # fmt: skip
            for refused in ("checksum", "copy_self"):
                if getattr(self.settings, refused):
                    raise SettingsError(f"{refused}: not of messages in GPU memory")
        except SettingsError as error:
            refusal, self.settings = error, Settings()
        if store is None:
            store = store_from_environment(rank, world_size, self.settings.timeout)
        settings = self.settings
        meeting = Rendezvous(store, name + "/gpu", rank, world_size, settings.timeout)
        try:
            if refusal is not None:
                raise refusal
            self.device = default_device(rank) if device is None else device
            self._core = self._allocate()
            blob = {"host": hosts.host_id(), "windows": b"" if settings.gpu_path == "staged" else self._handle()}
        except BaseException as error:
            meeting.report(error)
            raise
        agreed = {"lag": settings.lag, "window_bytes": settings.window_bytes, "on": "a GPU"}
        met = meeting.meet(agreed, blob)
        # Whether anything is staged decides, for all alike, how large windows in host memory have to be.
        meeting = Rendezvous(store, name + "/gpu-paths", rank, world_size, settings.timeout)
        try:
            staged = self._map(met.blobs)
        except BaseException as error:
            meeting.report(error)
            raise
        any_staged = any(blob["staged"] for blob in meeting.meet({}, {"staged": staged}).blobs)
        self._inner = Exchange(
            store, rank, world_size, name=name, lag=settings.lag, timeout=settings.timeout,
            window_bytes=settings.window_bytes if any_staged else 0, close_timeout=settings.close_timeout,
            keepalive=settings.keepalive, trace=settings.trace, checksum=False, copy_self=False,
            memory_limit=settings.memory_limit, _device_bytes=max(1, settings.window_bytes),
        )  # fmt: skip
        try:
            self._core.attach(self._inner._core, self._inner._arena)
        except BaseException as error:
            self._inner.close(error)
            raise
        self._timeout_ns = timeout_ns(settings.timeout)
        self._next = 0
        self._placed: Placement | None = None
        self._opened()
        log.info(
            "exchange %r: rank %d of %d has %s of windows on GPU %d (%s); peers are reached so: %s",
            name, rank, world_size, format_size(self.device_bytes), self.device, open_device(self.device).name,
            ", ".join(f"{q} {path}" for q, path in enumerate(self._paths())),
        )  # fmt: skip

    # --- what it is

    @property
    def lag(self) -> int:
        """Iterations this rank may run ahead of the slowest."""
        return self.settings.lag

    @property
    def window_bytes(self) -> int:
        """The largest message to another rank, in bytes."""
        return self.settings.window_bytes

    @property
    def device_bytes(self) -> int:
        """Windows and staging memory of this rank on its GPU, in bytes."""
        return self._core.device_bytes

    @property
    def memory_bytes(self) -> int:
        """Registered host memory of this rank, in bytes."""
        return self._inner.memory_bytes

    @property
    def iteration(self) -> int:
        """The number of the next iteration to be posted."""
        return self._inner.iteration

    # --- the loop

    def begin(self, timeout: float | None = None) -> int:
        """Wait until work on the next iteration may begin, and return its number; as Exchange.begin."""
        return self._inner.begin(timeout)

    def post(
        self, send: Any, counts: Counts | None = None, *, stream: Stream = None, timeout: float | None = None
    ) -> GpuHandle:
        """Send this rank's messages of the next iteration, once the work that `stream` holds now is done.

        Parameters:
            send: a contiguous CUDA tensor, or an array with __cuda_array_interface__, on this exchange's device. It
                belongs to the exchange until the handle says sent().
            counts: counts[q] items along the leading dimension go to rank q; they add up to send.shape[0]. None: equal
                parts.
            stream: that on which `send` is produced; see blsrdma.gpu.device.stream_address.
            timeout: seconds, for the lag bound.

        Nothing has been sent when it raises SendBufferError, CountsError, MessageTooLarge, WindowHeld, PeerTimeout or
        PeerFailed. After GpuError the device is of no more use, and so is the exchange.
        """
        self._inner._usable()
        buffer = arrays.describe(send, self.device)
        split = equal_counts(buffer.items, self.world_size) if counts is None else as_counts(counts, self.world_size)
        total = sum(map(int, split))
        if (split < 0).any() or total != buffer.items:
            raise CountsError(f"counts {split.tolist()} do not add up to send.shape[0] = {buffer.items}")
        handle = self._announce(buffer, [int(n) * buffer.item_bytes for n in split], stream, timeout)
        handle._send = send
        self._hand_over(buffer.address, handle._stream)
        return handle

    def place(
        self,
        counts: Counts,
        shape: tuple[int, ...] = (),
        dtype: Any = np.float32,
        *,
        like: Any = None,
        stream: Stream = None,
        timeout: float | None = None,
    ) -> Placement:
        """Take the next iteration, for messages that a kernel writes where they belong: counts[q] items of `shape` and
        `dtype` for rank q (or as the items of the array `like`).

        The addresses that it gives lie in the peers' own windows where these can be written, so that nothing is copied;
        and in memory to be staged elsewhere. Launch the kernel on `stream`, for what this device still does with its
        own window comes first there; then call `Placement.post`: nothing else can be posted before. Raises as post()
        does.
        """
        self._inner._usable()
        if self._placed is not None:
            raise WindowHeld(f"iteration {self._placed.iteration} has been placed and not been posted")
        buffer = arrays.plain(0, (0, *shape), np.dtype(dtype)) if like is None else arrays.describe(like, self.device)
        split = as_counts(counts, self.world_size)
        if (split < 0).any():
            raise CountsError(f"counts {split.tolist()}: none can be negative")
        sizes = [int(n) * buffer.item_bytes for n in split]
        if sizes[self.rank] > self.window_bytes:
            raise self._too_large(self.rank, sizes[self.rank])
        handle = self._announce(buffer, sizes, stream, timeout)
        self._core.order_for_writing(handle._stream)
        self._placed = Placement(self, handle, [self._core.address(q) for q in range(self.world_size)])
        return self._placed

    # --- what it did

    def stats(self) -> dict[str, Any]:
        """As Exchange.stats; `path` and `large` of a peer are ipc or staged, `why_staged` says why not ipc, and
        `device_bytes` is the GPU memory that is used."""
        stats = self._inner.stats()
        for peer, path in zip(stats["peers"], self._paths(), strict=True):
            peer["path"], peer["large"] = path, ""
            if path == "staged":
                peer["why_staged"] = self._why[peer["rank"]]
        return stats | {"device_bytes": self.device_bytes}

    # --- the end

    def _leave(self, error: BaseException | None) -> None:
        at_rest = False
        try:
            at_rest = self._core.quiesce(timeout_ns(self.settings.close_timeout))
        except GpuError as failed:
            error = error or failed
        if not at_rest and error is None and self._placed is None:
            error = GpuError("its GPU did not finish what it had to send")
        try:
            self._inner.close(error)
        finally:
            if at_rest and self._inner._quiet:
                with suppress(GpuError):  # the device has failed meanwhile: its memory goes with it
                    self._core.close(True)
            else:
                log.info("exchange %r: its GPU, or a peer, may still use its windows: they are kept until the process "
                         "ends", self.name)  # fmt: skip
                quarantine.append((self._core, self._inner))

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"lag {self.lag}, GPU {self.device}"
        return f"<GpuExchange {self.name!r}: rank {self.rank} of {self.world_size}, {state}>"

    # --- inside

    def _allocate(self) -> native.cuda.GpuExchange:
        windows, stride = windows_needed(self.lag), round_up(max(1, self.window_bytes), ALIGNMENT)
        need, device = windows * stride * self.world_size, open_device(self.device)
        if need > (free := device.free_bytes):
            raise MemoryLimitExceeded(
                f"windows need {format_size(need)} of GPU {self.device} ({self.world_size} sources x {windows} windows "
                f"of {format_size(self.window_bytes)}); {format_size(free)} are free there"
            )
        return native.cuda.GpuExchange(device, self.rank, self.world_size, self.window_bytes, stride, windows, self.lag)

    def _handle(self) -> bytes:
        """What lets peers on this host write this rank's windows; b"" where CUDA has nothing of the kind here."""
        try:
            return self._core.ipc_handle()
        except GpuError as error:
            log.info("exchange %r: peers cannot write this rank's GPU memory: %s", self.name, error)
            return b""

    def _map(self, blobs: Sequence[dict[str, Any]]) -> list[int]:
        """Map what can be mapped; the ranks to which messages have to be staged. Raises GpuError where none may be."""
        self._why = [""] * self.world_size
        for q, blob in enumerate(blobs):
            if q == self.rank:
                continue
            if self.settings.gpu_path == "staged":
                self._why[q] = "gpu_path is staged"
            elif blob["host"] != blobs[self.rank]["host"]:
                self._why[q] = "it is on another host"
            elif not blob["windows"]:
                self._why[q] = "it does not offer its GPU memory"
            elif not self._core.map(q, blob["windows"]):
                self._why[q] = self._core.why_not(q)
        staged = [q for q, why in enumerate(self._why) if why]
        if staged and self.settings.gpu_path == "ipc":
            raise GpuError(f"gpu_path = 'ipc': rank {staged[0]}'s GPU memory cannot be written: {self._why[staged[0]]}")
        return staged

    def _paths(self) -> list[str]:
        return [
            "self" if q == self.rank else "ipc" if self._core.mapped(q) else "staged" for q in range(self.world_size)
        ]

    def _too_large(self, rank: int, size: int) -> MessageTooLarge:
        return MessageTooLarge(
            f"exchange {self.name!r}, iteration {self._next}: the message for rank {rank} has {size} bytes, a window "
            f"of GPU memory {self.window_bytes}: raise window_bytes",
            rank, size, self.window_bytes,
        )  # fmt: skip

    def _announce(self, buffer: arrays.GpuBuffer, sizes: list[int], stream: Stream, timeout: float | None) -> GpuHandle:
        if self._placed is not None:
            raise WindowHeld(f"iteration {self._placed.iteration} has been placed and not been posted")
        for q, size in enumerate(sizes):
            if size > self.window_bytes and q != self.rank:
                raise self._too_large(q, size)
        limit = self._timeout_ns if timeout is None else timeout_ns(timeout)
        began = monotonic_ns()
        outcome = self._core.announce(sizes, buffer.tag, limit)
        self._traced("post", self._next, began, outcome)
        if outcome:
            raise self._inner._error(outcome)
        handle = GpuHandle(self, self._next, buffer, sizes[self.rank], stream_address(stream, self.device))
        self._next += 1
        return handle

    def _traced(self, kind: str, iteration: int, began: int, outcome: int) -> None:
        """A call of the host's; what the device does is not in the trace."""
        if (span := self._inner._span) is not None:
            span(kind, iteration, began, outcome)

    def _hand_over(self, address: int, stream: int) -> None:
        try:
            self._core.send(address, stream)
        except GpuError as error:
            self._inner._failure, self._inner._live = error, False
            raise

    def _view(self, handle: GpuHandle, source: int) -> Any:
        """Rank `source`'s message."""
        inner, iteration = self._inner, handle.iteration
        length = handle._own_bytes if source == self.rank else inner._core.message(iteration, source)[1]
        if length % max(1, handle._buffer.item_bytes):
            raise CountsError(
                f"rank {source} sent {length} bytes in iteration {iteration}: not whole items of "
                f"{handle._buffer.item_bytes} bytes, as this rank's have"
            )
        address = self._core.message(iteration, source)
        return handle._buffer.view(address, length, self._core if source != self.rank else (self._core, handle._send))
