"""The front doors: numpy arrays and torch tensors in, views of the same kind out. Inside there are only bytes.

The usual cases never come here: native/arrays.cpp looks at them without a Python frame. What it does not know does:
subclasses, rarer dtypes, everything that is to be refused. Torch is not imported here unless the caller already has: a
numpy user never pays for it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from blsrdma.errors import CountsError, SendBufferError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    Array: TypeAlias = NDArray[Any] | torch.Tensor
    Counts: TypeAlias = Sequence[int] | NDArray[np.integer[Any]] | torch.Tensor

Bytes: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class SendBuffer:
    """What the core needs to know of a buffer, and how to give bytes back in its likeness."""

    address: int
    items: int  # along the leading dimension
    item_bytes: int  # of one such item
    tag: int  # element type, for comparing with the peers'
    view: Callable[[Bytes], Any]  # bytes -> array or tensor of the same dtype and trailing shape
    writable: bool = True


def describe(send: Array) -> SendBuffer:
    """Look at `send` through the door that fits it. Raises SendBufferError."""
    if isinstance(send, np.ndarray):
        return _from_numpy(send)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(send, torch.Tensor):
        return _from_torch(send)
    raise SendBufferError(f"send must be a numpy array or a torch tensor, not {type(send).__name__}")


def equal_counts(items: int, ranks: int) -> NDArray[np.int64]:
    """`items` in equal parts. Raises CountsError when they do not divide."""
    if items % ranks:
        raise CountsError(f"send has {items} items, which do not divide by {ranks} ranks: pass counts")
    return np.full(ranks, items // ranks, dtype=np.int64)


def as_counts(counts: Counts, ranks: int) -> NDArray[np.int64]:
    """`counts` as a contiguous int64 vector of length `ranks`. Raises CountsError."""
    array = np.asarray(counts)
    if array.dtype.kind not in "iu" and array.size:
        raise CountsError(f"counts must be integers, not {array.dtype}")
    if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
        raise CountsError(f"counts must be below 2^63, not {array.max()}")
    if array.shape != (ranks,):
        raise CountsError(f"counts must have one entry per rank, {ranks}, not the shape {array.shape}")
    return np.ascontiguousarray(array, dtype=np.int64)


def tag_name(tag: int) -> str:
    """A tag as text: the dtype's kind and size."""
    return f"{chr(tag & 0xFF)}{tag >> 8}"


def type_tag(kind: str, itemsize: int) -> int:
    """An element type: its kind's letter and its size in bytes, the same for numpy's and torch's float32."""
    return ord(kind) | itemsize << 8


def _from_numpy(send: NDArray[Any]) -> SendBuffer:
    dtype = send.dtype
    if dtype.hasobject:
        raise SendBufferError(f"send has dtype {dtype}: Python objects cannot be sent")
    if not dtype.isnative:
        raise SendBufferError(f"send has dtype {dtype}: not in this machine's byte order")
    if send.ndim == 0:
        raise SendBufferError("send has no dimension to split: pass at least a vector")
    if not send.flags.c_contiguous:
        raise SendBufferError(f"send is not C-contiguous (strides {send.strides}): pass np.ascontiguousarray(send)")
    trailing = send.shape[1:]
    item_bytes = dtype.itemsize
    for extent in trailing:
        item_bytes *= extent

    def view(data: Bytes) -> NDArray[Any]:
        typed: NDArray[Any] = data.view(dtype)
        return typed.reshape(_leading(len(data), item_bytes), *trailing) if trailing else typed

    address: int = send.__array_interface__["data"][0]
    return SendBuffer(
        address, send.shape[0], item_bytes, type_tag(dtype.kind, dtype.itemsize), view, send.flags.writeable
    )


# torch dtypes by numpy's kinds, for the tag; those that numpy does not know get letters of their own.
_TORCH_KINDS = {"bool": "b", "uint": "u", "int": "i", "float": "f", "complex": "c", "bfloat": "B"}


def _from_torch(send: torch.Tensor) -> SendBuffer:
    import torch

    if send.device.type != "cpu":
        hint = ": blsrdma.GpuExchange sends those" if send.device.type == "cuda" else ""
        raise SendBufferError(f"send is on {send.device}: only CPU tensors can be posted here{hint}")
    item_bytes, tag, retype = torch_layout(send)
    return SendBuffer(send.data_ptr(), send.shape[0], item_bytes, tag, lambda data: retype(torch.from_numpy(data)))


def torch_layout(send: torch.Tensor) -> tuple[int, int, Callable[[torch.Tensor], torch.Tensor]]:
    """Bytes of an item, the tag, and what makes a tensor like `send` of a vector of bytes. Raises SendBufferError."""
    import torch

    dtype = send.dtype
    if send.layout is not torch.strided or send.is_quantized:
        raise SendBufferError(f"send has layout {send.layout} and dtype {dtype}: only dense tensors can be posted")
    if send.dim() == 0:
        raise SendBufferError("send has no dimension to split: pass at least a vector")
    if not send.is_contiguous():
        raise SendBufferError(f"send is not contiguous (strides {send.stride()}): pass send.contiguous()")
    if send.is_conj() or send.is_neg():
        raise SendBufferError("send is a lazy conjugate or negative: pass send.resolve_conj().resolve_neg()")
    trailing = send.shape[1:]
    item_bytes = send.element_size()
    for extent in trailing:
        item_bytes *= extent
    name = str(dtype).removeprefix("torch.")
    kind = _TORCH_KINDS.get(name.split("_")[0].rstrip("0123456789"), "?")
    if "_" in name:  # float8_e4m3fn and its like: as many letters as there are formats
        kind = chr(0x80 + sum(name.encode()) % 0x80)

    def retype(data: torch.Tensor) -> torch.Tensor:
        tensor = data.view(dtype)
        return tensor.view(_leading(len(data), item_bytes), *trailing) if trailing else tensor

    return item_bytes, type_tag(kind, send.element_size()), retype


def _leading(total_bytes: int, item_bytes: int) -> int:
    return total_bytes // item_bytes if item_bytes else 0
