"""Arrays on a device, for tests of kernels."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from blsrdma._native import cuda


class OnDevice:
    """Arrays copied to a device, and room on it; all of it stays until this goes."""

    def __init__(self, device: cuda.Device) -> None:
        self.device = device
        self._kept: list[cuda.Memory | cuda.HostMemory] = []

    def put(self, array: NDArray[Any] | torch.Tensor, offset: int = 0) -> int:
        """The address of a copy, `offset` bytes behind one that is aligned."""
        host = np.ascontiguousarray(array)
        address = self.room(host.nbytes + offset) + offset
        self.device.copy(address, host.ctypes.data, host.nbytes)
        assert self.device.synchronize(0, 10**10)
        return address

    def room(self, size: int) -> int:
        self._kept.append(memory := self.device.memory(max(size, 16)))
        return memory.address

    def put_on_host(self, array: NDArray[Any]) -> int:
        """The address for kernels of a copy in page-locked host memory."""
        self._kept.append(memory := self.device.host_memory(max(array.nbytes, 16)))
        ctypes.memmove(memory.host, np.ascontiguousarray(array).ctypes.data, array.nbytes)
        return memory.address

    def floats(self, address: int, *sizes: int) -> torch.Tensor:
        out = torch.empty(sizes)
        self.device.copy(out.data_ptr(), address, out.nbytes)
        assert self.device.synchronize(0, 10**10)
        return out

    def close(self) -> None:
        """Free all of it."""
        for memory in self._kept:
            memory.close()
