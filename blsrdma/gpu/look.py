"""What `python -m blsrdma info` tells of GPUs: tried out in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from blsrdma.errors import GpuError

_BYTES = 2 << 20


def here(maps: Callable[[int], str]) -> dict[str, Any]:
    """The driver's version, the devices, and whether IPC works; `error` where there is none.

    maps(handle) tries, in another process, to map memory of the first device: why it could not, or "".
    """
    from blsrdma.gpu.device import count, open_device
    from blsrdma.ucx import native

    try:
        found: dict[str, Any] = {"driver": native.cuda.load(), "devices": []}
        for ordinal in range(count()):
            device = open_device(ordinal)
            found["devices"].append({
                "name": device.name, "capability": list(device.capability), "total_bytes": device.total_bytes,
                "free_bytes": device.free_bytes,
            })  # fmt: skip
        if found["devices"]:
            memory = open_device(0).memory(_BYTES)
            try:
                found["ipc"] = maps(int.from_bytes(memory.ipc_handle(), "big"))
            except GpuError as error:
                found["ipc"] = str(error)
            finally:
                memory.close()
            found["nvrtc"], found["no_nvrtc"] = _nvrtc()
        return found
    except GpuError as error:
        return {"error": str(error)}


def maps(handle: int) -> dict[str, str]:
    """Whether this process can map another's memory of the first device; `error`: why not."""
    from blsrdma.gpu.device import open_device

    try:
        open_device(0).map(handle.to_bytes(64, "big")).close()
        return {"error": ""}
    except GpuError as error:
        return {"error": str(error)}


def _nvrtc() -> tuple[str, str]:
    """Its version, or why there is none."""
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
        return (f"{major}.{minor}", "") if int(status) == 0 else ("", f"nvrtcVersion: {status}")
    except Exception as error:  # cuda-bindings says by many kinds what it did not find
        return "", f"{type(error).__name__}: {error}".splitlines()[0]
