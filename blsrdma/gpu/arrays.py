"""GPU memory at the front doors: torch's CUDA tensors, and whatever has __cuda_array_interface__ (cupy, numba), in;
views of the same kind out. Inside there are only addresses and bytes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from blsrdma.buffers import torch_layout, type_tag
from blsrdma.errors import SendBufferError

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True)
class GpuArray:
    """C-contiguous memory of a device, for any library that knows __cuda_array_interface__ (cupy.asarray,
    torch.as_tensor, numba.cuda.as_cuda_array): no copy is made. `owner` is kept alive with it."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: object = field(repr=False, default=None)

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "version": 3,
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address if self.nbytes else 0, False),
            "strides": None,
            "stream": None,  # what is given out has arrived, or the user's stream waits for it
        }


@dataclass(frozen=True)
class GpuBuffer:
    """What an exchange needs to know of an array on a device."""

    address: int
    items: int  # along the leading dimension
    item_bytes: int  # of one such item
    tag: int  # element type, for comparing with the peers'
    view: Callable[
        [int, int, object], Any
    ]  # (address, bytes, owner) -> an array of the same kind, type, trailing shape


def describe(send: Any, device: int) -> GpuBuffer:
    """Look at `send`, which must be on `device`. Raises SendBufferError."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(send, torch.Tensor):
        return _from_torch(send, device)
    interface = getattr(send, "__cuda_array_interface__", None)
    if interface is None:
        raise SendBufferError(
            f"send must be a CUDA tensor, or have __cuda_array_interface__, not {type(send).__name__}: "
            "blsrdma.Exchange sends from CPU memory"
        )
    dtype = np.dtype(interface["typestr"])
    if dtype.hasobject or not dtype.isnative:
        raise SendBufferError(f"send has dtype {dtype}: only plain types in this machine's byte order can be sent")
    shape = tuple(interface["shape"])
    if not shape:
        raise SendBufferError("send has no dimension to split: pass at least a vector")
    contiguous = tuple(dtype.itemsize * prod(shape[d + 1 :]) for d in range(len(shape)))
    strides = interface.get("strides")
    if strides is not None and tuple(strides) != contiguous and prod(shape):
        raise SendBufferError(f"send is not C-contiguous (strides {tuple(strides)}): send a contiguous copy")
    return plain(int(interface["data"][0]), shape, dtype)


def plain(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> GpuBuffer:
    """A buffer that no library of the user's knows: views of it are GpuArrays."""
    item_bytes = dtype.itemsize * prod(shape[1:])

    def view(at: int, size: int, owner: object) -> GpuArray:
        return GpuArray(at, (size // item_bytes if item_bytes else 0, *shape[1:]), dtype, owner)

    return GpuBuffer(address, shape[0], item_bytes, type_tag(dtype.kind, dtype.itemsize), view)


def _from_torch(send: Any, device: int) -> GpuBuffer:
    import torch

    if send.device != torch.device("cuda", device):
        raise SendBufferError(f"send is on {send.device}: this exchange sends from cuda:{device}")
    item_bytes, tag, retype = torch_layout(send)

    def view(address: int, size: int, owner: object) -> Any:
        # torch keeps the GpuArray, and so the owner, alive for as long as the tensor.
        data = GpuArray(address, (size,), np.dtype(np.uint8), owner)
        if not size:
            return retype(torch.empty(0, dtype=torch.uint8, device=send.device))
        return retype(torch.as_tensor(data, device=send.device))

    return GpuBuffer(send.data_ptr(), send.shape[0], item_bytes, tag, view)
