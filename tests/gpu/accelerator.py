"""What dlrm.gpu.accelerator is on a real GPU, for the simulated one: torch's CPU tensors over its memory.

A dense function runs on the host, once the stream that it belongs to has come so far: in the order of a GPU, though not
as asynchronous. All else of a run (uploads, kernels, the exchange) is the product's own code on the simulated driver,
which must not keep its memory from the host (SIMULATED_CUDA_PROTECT=0): other streams use it at the same time.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch

from blsrdma.gpu.device import open_device
from dlrm.gpu.accelerator import WARM_UPS, Accelerator, Lane

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

TIMEOUT_NS = 60_000_000_000


class SimulatedAccelerator(Accelerator):
    """torch on device 0 of the simulated driver."""

    def __init__(self, ordinal: int = 0) -> None:
        self.device = open_device(ordinal)
        self._memory: list[Any] = []
        self._streams: list[Any] = []
        self.graphs = 0
        self.patience_ns = TIMEOUT_NS

    def lane(self) -> Lane:
        self._streams.append(stream := self.device.stream())
        return Lane(stream.address)

    def zeros(self, *shape: int) -> Tensor:
        size = max(4, 4 * torch.Size(shape).numel())
        self._memory.append(memory := self.device.memory(size))
        self.device.fill(memory.address, 0, size)
        return torch.frombuffer((ctypes.c_uint8 * size).from_address(memory.address), dtype=torch.float32)[
            : torch.Size(shape).numel()
        ].view(shape)

    def settle(self) -> None:
        for address in (0, *(stream.address for stream in self._streams)):
            assert self.device.synchronize(address, TIMEOUT_NS)

    def prepared(self, work: Callable[[], None], lane: Lane, graph: bool) -> Callable[[], None]:
        self.graphs += graph

        def put() -> None:
            if self.device.synchronize(lane.address, self.patience_ns):  # else it hangs, and never comes to this
                work()

        self.settle()
        for _ in range(WARM_UPS):
            put()
        return put
