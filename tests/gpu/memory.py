"""Memory of a device, and of the host, for tests."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np
import torch

from blsrdma.gpu.arrays import GpuArray

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


def pinned(device: cuda.Device, size: int, dtype: Any = np.uint8) -> NDArray[Any]:
    """Page-locked host memory, as an array: the host does not wait for copies from and to it."""
    memory = device.host_memory(max(1, size))
    buffer = (ctypes.c_uint8 * size).from_address(memory.host)
    array: NDArray[Any] = np.frombuffer(buffer, dtype)
    buffer.memory = memory  # type: ignore[attr-defined]  # kept with it
    return array


def vector(device: cuda.Device, values: NDArray[Any]) -> GpuArray:
    """A copy on the device."""
    memory = device.memory(max(1, values.nbytes))
    device.copy(memory.address, values.ctypes.data, values.nbytes, 0)
    assert device.synchronize(0, 10**10)
    return GpuArray(memory.address, values.shape, values.dtype, memory)
