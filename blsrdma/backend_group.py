"""The process group "bls": all_to_all on an Exchange, for CUDA tensors on a GpuExchange; everything else by gloo (CPU)
and NCCL (CUDA).

It is a Python subclass of torch's ProcessGroup. Mind, when changing it:

- Where a Python group does not override a method, torch's trampoline (PyProcessGroup.hpp) calls the C++ one with the
  GIL held; gloo's worker thread may want the GIL, to drop a tensor, while it holds the lock that this call waits for.
  So everything is overridden, and handed to a plain C++ group with the same backends, whose methods release the GIL.
- all_to_all_single (torch >= 2.13) and alltoall_base are one function here; super().all_to_all_single would call
  alltoall_base, that is, itself.
- The base's split_group and merge_remote_group crash on a Python group. An attribute `new_group` would be taken for
  torch's own factory.
- An overridden method sees whatever the user passed: torch's dispatcher has not unwrapped tensor subclasses (_plain
  does).
"""

from __future__ import annotations

import hashlib
import os
import threading
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup

from blsrdma.backend import NAME, Options
from blsrdma.backend_lane import Lane
from blsrdma.backend_splits import plan
from blsrdma.backend_work import AllToAllWork, Done
from blsrdma.errors import BlsrdmaError, CountsError, SettingsError
from blsrdma.rendezvous import Rendezvous
from blsrdma.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import Store

    from blsrdma.exchange import Exchange

_RecordFunctionFast: Any = torch._C._profiler._RecordFunctionFast
_UNSET = timedelta(0)


class BlsProcessGroup(ProcessGroup):
    """A group of ranks. Its exchange is made by the first all_to_all, for many groups never do one."""

    def __init__(
        self,
        store: Store,
        rank: int,
        ranks: int,
        timeout: timedelta,
        options: Any = None,
        *,
        name: str = "",
        global_ranks: list[int] | None = None,
    ) -> None:
        super().__init__(rank, ranks)  # type: ignore[call-arg]  # with a store it cannot be subclassed
        self._timeout = timeout
        self._ranks = ranks
        # torch numbers groups as each rank counts them: disjoint ones may have one name, and would meet in the store.
        store = PrefixStore(f"{_short_hash(global_ranks)}/", store) if global_ranks else store
        rendezvous = Rendezvous(store, "group", rank, ranks, timeout.total_seconds())
        try:
            self.options, nccl_options = _as_options(options)
            settings, seconds = _resolve(self.options, timeout)
        except SettingsError as error:
            rendezvous.report(error)
            raise
        # The store may hold what ranks wrote before a restart, which gloo would believe: a fresh prefix for everything.
        met = rendezvous.meet({"lag": settings.lag, "window_bytes": settings.window_bytes}, {})
        self._store = PrefixStore(f"{met.id}/", store)
        self._settings = {"lag": settings.lag, "window_bytes": settings.window_bytes}
        self._lane = Lane(self._store, rank, ranks, seconds, **self._settings)
        self._gpu_lanes: dict[int, Lane] = {}  # by the number of the device, of CUDA tensors
        self._making = threading.Lock()  # of these
        self._done = Done([])
        self._rest = ProcessGroup(self._store, rank, ranks)
        self._add_gloo(name, global_ranks or [])
        if torch.cuda.is_available() and dist.is_nccl_available():
            self._add_nccl(name, global_ranks or [], nccl_options)
        self._rest._set_group_name(name)  # type: ignore[arg-type]

    @property
    def exchange(self) -> Exchange | None:
        """The group's Exchange (for its stats()), None before the first all_to_all."""
        return self._lane.exchange

    # --- all_to_all

    def all_to_all_single(
        self,
        output: Tensor,
        input: Tensor,  # noqa: A002 (torch's name)
        output_split_sizes: Sequence[int] = (),
        input_split_sizes: Sequence[int] = (),
        opts: Any = None,
    ) -> dist.Work:
        with _RecordFunctionFast("bls:all_to_all"):
            if type(input) is not Tensor or type(output) is not Tensor:
                output, input = _plain(output), _plain(input)  # noqa: A001
            lane = self._lane_of(input)
            if lane is None or output.device != input.device:
                return self._rest.alltoall_base(
                    output, input, list(output_split_sizes), list(input_split_sizes), *_given(opts)
                )
            if output.dtype is not input.dtype:
                raise SettingsError(f"all_to_all_single: output is {output.dtype}, input {input.dtype}")
            send, counts, receive, expected = plan(output, input, output_split_sizes, input_split_sizes, self._ranks)
            return self._go(lane, send, counts, receive, expected, opts)

    alltoall_base = all_to_all_single  # type: ignore[assignment]  # its name before torch 2.13, and in C++

    def alltoall(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], opts: Any = None) -> dist.Work:
        with _RecordFunctionFast("bls:all_to_all"):
            outputs, inputs = [_plain(t) for t in outputs], [_plain(t) for t in inputs]
            if len(outputs) != self._ranks or len(inputs) != self._ranks:
                raise CountsError(
                    f"all_to_all needs one tensor per rank, {self._ranks}, not {len(inputs)} in and {len(outputs)} out"
                )
            lane = self._lane_of(inputs[0])
            if lane is None or any(tensor.device != inputs[0].device for tensor in (*inputs, *outputs)):
                return self._rest.alltoall(outputs, inputs, *_given(opts))
            for tensor in (*inputs, *outputs):
                if tensor.dtype is not inputs[0].dtype:
                    raise SettingsError(f"all_to_all: tensors are {tensor.dtype} and {inputs[0].dtype}")
            send = torch.cat([tensor.detach().reshape(-1) for tensor in inputs])
            return self._go(lane, send, [t.numel() for t in inputs], outputs, [t.numel() for t in outputs], opts)

    def _lane_of(self, tensor: Tensor) -> Lane | None:
        """Of the device that the tensor is on; each GPU's is made by the first operation there. None: a device of whose
        memory we know nothing."""
        if tensor.is_cpu:
            return self._lane
        if not tensor.is_cuda:
            return None
        number = tensor.device.index
        with self._making:
            if number not in self._gpu_lanes:
                from blsrdma.gpu.backend_lane import GpuLane

                store = PrefixStore(f"gpu/{len(self._gpu_lanes)}/", self._store)
                timeout, settings = self._lane.timeout, self._settings
                made = GpuLane(store, self.rank(), self.size(), timeout, device=number, **settings)
                if self._lane.ended is not None:  # the group has: this one makes no exchange
                    made.close(self._lane.ended)
                self._gpu_lanes[number] = made
            return self._gpu_lanes[number]

    def _go(
        self,
        lane: Lane,
        send: Tensor,
        counts: list[int] | None,
        outputs: Tensor | list[Tensor],
        expected: list[int],
        opts: Any,
    ) -> dist.Work:
        timeout = None
        if opts is not None:
            given = opts if type(opts) is timedelta else opts.timeout
            if given > _UNSET:
                timeout = given.total_seconds()
            if opts is not given and not opts.asyncOp:
                lane.run(send, counts, outputs, expected, timeout)
                return self._done
        return AllToAllWork.of(lane, lane.post(send, counts, outputs, expected, timeout))

    # --- the group

    def getBackendName(self) -> str:  # noqa: N802 (torch's name; TorchRec fakes collectives of one called "custom")
        return NAME

    def name(self) -> str:
        return NAME

    def get_group_store(self) -> Store:
        return self._store

    def set_timeout(self, timeout: timedelta) -> None:
        self._timeout = timeout
        for lane in self._lanes():
            lane.timeout = timeout.total_seconds()
        for device in self._device_types:
            self._get_backend(device).set_timeout(timeout)

    def split_group(
        self,
        new_ranks: Sequence[int],
        timeout: timedelta | None = None,
        opts: Any = None,
        group_name: str | None = None,
        group_desc: str | None = None,
        device_types: Any = None,  # noqa: ARG002
    ) -> BlsProcessGroup | None:
        """A group of some ranks of this one, numbered as they are listed; None on the others."""
        ranks = list(new_ranks)
        if self.rank() not in ranks:
            return None
        name = group_name or f"{self.group_name}:split:{'-'.join(map(str, ranks))}"
        group = BlsProcessGroup(
            PrefixStore(f"{name}/", self._store), ranks.index(self.rank()), len(ranks), timeout or self._timeout,
            opts if opts is not None else self.options, name=name,
        )  # fmt: skip
        group._set_group_name(name)  # type: ignore[arg-type]
        group._set_group_desc(group_desc or f"{self.group_desc}:split")
        return group

    def merge_remote_group(self, *_: Any, **__: Any) -> BlsProcessGroup:
        raise NotImplementedError(f"groups of the backend {NAME!r} cannot be merged")

    def shutdown(self) -> None:
        """destroy_process_group: leave. Idempotent."""
        self._close_lanes()
        self._rest.shutdown()

    def abort(self) -> None:
        """End every wait of this rank with an error, from any thread; the peers' too. Idempotent."""
        self._close_lanes(BlsrdmaError("the process group has been aborted"))
        self._rest.abort()

    def _lanes(self) -> list[Lane]:
        with self._making:
            return [self._lane, *self._gpu_lanes.values()]

    def _close_lanes(self, error: BaseException | None = None) -> None:
        self._lane.close(error)  # once it has ended, no other one begins
        for lane in self._lanes():
            lane.close(error)

    # --- the backends that do the rest

    def _add_gloo(self, name: str, global_ranks: list[int]) -> None:
        gloo = dist.ProcessGroupGloo(PrefixStore("gloo/", self._store), self.rank(), self.size(), self._timeout)
        gloo.options.global_ranks_in_group = global_ranks
        gloo.options.group_name = name  # type: ignore[assignment]
        self._add("cpu", ProcessGroup.BackendType.GLOO, gloo)

    def _add_nccl(self, name: str, global_ranks: list[int], options: Any) -> None:
        options = options or dist.ProcessGroupNCCL.Options()
        options._timeout = self._timeout
        options.global_ranks_in_group = global_ranks
        options.group_name = name
        nccl = dist.ProcessGroupNCCL(PrefixStore("nccl/", self._store), self.rank(), self.size(), options)
        self._add("cuda", ProcessGroup.BackendType.NCCL, nccl)

    def _add(self, device: str, kind: ProcessGroup.BackendType, backend: Any) -> None:
        backend._set_sequence_number_for_group()
        for group in (self, self._rest):
            group._register_backend(torch.device(device), kind, backend)
            if device == "cpu":
                group._set_default_backend(kind)


_REST = (
    "_allgather_base", "_reduce_scatter_base", "all_gather_single", "all_gather_single_coalesced", "allgather",
    "allgather_coalesced", "allgather_into_tensor_coalesced", "allreduce", "allreduce_coalesced", "barrier",
    "broadcast", "gather", "monitored_barrier", "recv", "recv_anysource", "reduce", "reduce_scatter",
    "reduce_scatter_single", "reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced", "scatter", "send",
)  # fmt: skip


def _handed_on(name: str) -> Any:
    def method(self: BlsProcessGroup, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._rest, name)(*args, **kwargs)

    method.__name__ = name
    return method


for _name in _REST:
    if hasattr(ProcessGroup, _name):  # some are new in torch 2.13
        setattr(BlsProcessGroup, _name, _handed_on(_name))


def _as_options(given: Any) -> tuple[Options, Any]:
    """Options for the exchange and for NCCL, of which `pg_options` may be either."""
    if given is None or isinstance(given, Options):
        return given or Options(), None
    if dist.is_nccl_available() and isinstance(given, dist.ProcessGroupNCCL.Options):
        return Options(), given
    raise SettingsError(f"pg_options must be blsrdma.Options, not {type(given).__name__}")


def _resolve(options: Options, timeout: timedelta) -> tuple[Settings, float]:
    """All settings, checked, and the timeout of operations: that of Options, BLSRDMA_TIMEOUT, or init_process_group."""
    settings = Settings.resolve(lag=options.lag, window_bytes=options.window_bytes, timeout=options.timeout)
    if options.timeout is None and "BLSRDMA_TIMEOUT" not in os.environ:
        return settings, timeout.total_seconds()
    return settings, settings.timeout


def _short_hash(ranks: list[int]) -> str:
    return hashlib.sha256(repr(ranks).encode()).hexdigest()[:16]


def _given(opts: Any) -> tuple[Any, ...]:
    return () if opts is None else (opts,)


def _plain(tensor: Tensor) -> Tensor:
    """A tensor with memory: the result of a functional collective is waited for."""
    if type(tensor) is not Tensor and hasattr(tensor, "trigger_wait"):
        return tensor.trigger_wait()  # type: ignore[no-any-return]
    return tensor
