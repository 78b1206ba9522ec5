"""Tables of a Lookup that lie in GPU memory (mode put): where they are, that they are complete, and who pools them.

Rows are used where the caller has them. The owner's serving thread and its own asks have a native GpuPooler each: a
stream, page-locked memory for a request and its response, and as much on the GPU. Kernels are compiled at the start.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blsrdma.errors import GpuError, MemoryLimitExceeded, SettingsError
from blsrdma.gpu import compiler
from blsrdma.gpu.arrays import GpuArray
from blsrdma.gpu.device import open_device
from blsrdma.settings import format_size, timeout_ns
from blsrdma.ucx import native

if TYPE_CHECKING:
    from collections.abc import Sequence

SOURCE = Path(__file__).with_name("pool_rows.cu")
POOLERS = 2


@dataclass(frozen=True)
class GpuRows:
    """A matrix in GPU memory; `stream`: what has been put on it by now writes there; None: nothing does."""

    array: GpuArray
    device: int | None  # None: it has no rows
    stream: int | None


def gpu_rows(table: int, data: Any) -> GpuRows | None:
    """Rows that lie in GPU memory; None: they do not. Raises SettingsError for those that cannot be served."""
    if getattr(data, "is_cuda", False):  # torch's
        import torch

        if not data.is_contiguous():
            raise SettingsError(f"table {table}: rows must be a contiguous matrix, not of strides {data.stride()}")
        kind = str(data.dtype).removeprefix("torch.")
        if kind not in ("float32", "float16", "uint8"):
            raise SettingsError(f"table {table}: rows of {kind}: they are float32, float16 or uint8")
        array = GpuArray(data.data_ptr(), tuple(data.shape), np.dtype(kind), data)
        return GpuRows(array, data.device.index, int(torch.cuda.current_stream(data.device).cuda_stream))
    if isinstance(data, np.ndarray) or (interface := getattr(data, "__cuda_array_interface__", None)) is None:
        return None
    shape, dtype = tuple(interface["shape"]), np.dtype(interface["typestr"])
    strides, contiguous = interface.get("strides"), [dtype.itemsize * prod(shape[d + 1 :]) for d in range(len(shape))]
    if strides is not None and list(strides) != contiguous and prod(shape):
        raise SettingsError(f"table {table}: rows must be a contiguous matrix, not of strides {tuple(strides)}")
    address, stream = int(interface["data"][0]), interface.get("stream")
    native.cuda.load()
    device = native.cuda.device_of(address) if prod(shape) else None
    if device == -1:
        raise SettingsError(f"table {table}: {address:#x} is no address of GPU memory")
    # 1 is the legacy default stream's name there, 0 the driver's.
    return GpuRows(GpuArray(address, shape, dtype, data), device, 0 if stream == 1 else stream)


def staging_bytes(request_bytes: int, response_bytes: int, dim: int) -> int:
    """Page-locked memory that a rank needs beside its tables, in bytes; and about as much of the GPU's."""
    return POOLERS * (3 * request_bytes + response_bytes + 8 * dim + 160)


class GpuTables:
    """A rank's own tables on one GPU.

    `numbers`: of these tables. Raises SettingsError where they are on several GPUs; GpuError.
    """

    def __init__(self, found: dict[int, GpuRows]) -> None:
        self.numbers = sorted(found)
        devices = sorted({each.device for each in found.values() if each.device is not None})
        if len(devices) > 1:
            raise SettingsError(f"tables {self.numbers} are on GPUs {devices}: a rank's tables lie on one GPU")
        self.device = devices[0] if devices else 0
        self.poolers: list[native.cuda.GpuPooler] = []  # for others, and for own asks

    def open(self, request_bytes: int, response_bytes: int, dim: int, timeout: float) -> None:
        """Compile the kernels, and set aside what pooling takes. Raises CompileError, MemoryLimitExceeded, GpuError."""
        device = open_device(self.device)
        image = compiler.compiled(SOURCE, {}, device.capability).image
        needed = staging_bytes(request_bytes, response_bytes, dim)
        if needed > (free := device.free_bytes):
            raise MemoryLimitExceeded(
                f"to answer requests of {format_size(request_bytes)} takes {format_size(needed)} of GPU {self.device}; "
                f"{format_size(free)} are free there"
            )
        sizes = (request_bytes, response_bytes, dim, timeout_ns(timeout))
        self.poolers = [native.cuda.GpuPooler(device, image, *sizes) for _ in range(POOLERS)]

    def settle(self, rows: Sequence[GpuRows], timeout: float) -> None:
        """Wait until the rows are complete: for what their streams hold now. Raises GpuError."""
        for stream in {each.stream for each in rows if each.stream is not None}:
            if not open_device(self.device).synchronize(stream, timeout_ns(timeout)):
                raise GpuError(
                    f"tables on GPU {self.device} are not complete after {timeout:g} s: what writes them hangs"
                )

    def failure(self) -> GpuError | None:
        """Why the GPU pools no more; None: it does."""
        for each in self.poolers:
            result, text = each.failure()
            if text:
                return GpuError(f"GPU {self.device} pools no rows any more: {text}", result)
        return None

    def close(self, timeout: float) -> bool:
        """Give back what was set aside. False: the GPU may still read the tables after so many seconds, or has
        failed."""
        end = time.monotonic() + timeout
        closed = [each.close(timeout_ns(max(0.0, end - time.monotonic()))) for each in self.poolers]
        return all(closed)
