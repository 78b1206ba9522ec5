"""CUDA's driver, through native/cuda.cpp, which looks it up at run time; and streams of whatever library.

Devices are opened in their primary context: torch, cupy and UCX share it.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import Any, Protocol, TypeAlias

from blsrdma.errors import GpuError
from blsrdma.ucx import native

Device = native.cuda.Device
Memory = native.cuda.Memory
HostMemory = native.cuda.HostMemory
Event = native.cuda.Event


class _TorchStream(Protocol):
    @property
    def cuda_stream(self) -> int: ...


class _CupyStream(Protocol):
    @property
    def ptr(self) -> int: ...


class _StandardStream(Protocol):
    def __cuda_stream__(self) -> tuple[int, int]: ...


Stream: TypeAlias = int | _TorchStream | _CupyStream | _StandardStream | native.cuda.Stream | None


def count() -> int:
    """How many devices there are. Raises GpuError where there is no driver."""
    return native.cuda.device_count()


def unavailable() -> str:
    """Why no GPU can be used here, in words; "" where one can."""
    try:
        return "" if count() else "CUDA's driver finds no device"
    except GpuError as error:
        return str(error)


def default_device(rank: int) -> int:
    """The GPU of a rank that names none: LOCAL_RANK, or its rank, modulo the devices that this process sees."""
    if (devices := count()) == 0:
        raise GpuError("CUDA's driver finds no device")
    return int(os.environ.get("LOCAL_RANK", rank)) % devices


@cache
def open_device(ordinal: int) -> native.cuda.Device:
    """Device number `ordinal` of this process. Raises GpuError, naming how many there are."""
    if not 0 <= ordinal < (devices := count()):
        raise GpuError(f"GPU {ordinal}: this process sees {devices}")
    return native.cuda.Device(ordinal)


def stream_address(stream: Stream, device: int) -> int:
    """The CUstream that is meant: an int, or a stream of torch, cupy or any library that follows the __cuda_stream__
    protocol. None: torch's current stream of the device where torch uses CUDA, else the null stream."""
    if stream is None:
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            return int(torch.cuda.current_stream(device).cuda_stream)
        return 0
    if isinstance(stream, int):
        return stream
    found: Any
    if (found := getattr(stream, "__cuda_stream__", None)) is not None:
        return int(found()[1])
    for name in ("cuda_stream", "ptr", "address"):
        if (found := getattr(stream, name, None)) is not None:
            return int(found)
    raise TypeError(f"not a CUDA stream: {stream!r}")
