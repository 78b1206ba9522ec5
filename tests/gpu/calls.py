"""The driver API by ctypes, on the simulated driver: for tests of the simulation itself."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_char, c_float, c_int, c_size_t, c_ubyte, c_uint, c_ulonglong, c_void_p
from pathlib import Path
from typing import Any

from tests.gpu import simulated

HostFunction = ctypes.CFUNCTYPE(None, c_void_p)


class IpcHandle(ctypes.Structure):
    _fields_ = (("bytes", c_char * 64),)


PARAMETERS: dict[str, list[Any]] = {
    "cuCtxSetCurrent": [c_void_p],
    "cuEventCreate": [c_void_p, c_uint],
    "cuEventDestroy_v2": [c_void_p],
    "cuEventElapsedTime": [c_void_p, c_void_p, c_void_p],
    "cuEventQuery": [c_void_p],
    "cuEventRecord": [c_void_p, c_void_p],
    "cuEventSynchronize": [c_void_p],
    "cuFuncSetAttribute": [c_void_p, c_int, c_int],
    "cuIpcCloseMemHandle": [c_ulonglong],
    "cuIpcGetMemHandle": [c_void_p, c_ulonglong],
    "cuIpcOpenMemHandle_v2": [c_void_p, IpcHandle, c_uint],
    "cuLaunchHostFunc": [c_void_p, HostFunction, c_void_p],
    "cuLaunchKernel": [c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p],
    "cuMemAllocHost_v2": [c_void_p, c_size_t],
    "cuMemAlloc_v2": [c_void_p, c_size_t],
    "cuMemFreeHost": [c_void_p],
    "cuMemFree_v2": [c_ulonglong],
    "cuMemHostRegister_v2": [c_void_p, c_size_t, c_uint],
    "cuMemHostUnregister": [c_void_p],
    "cuMemcpyAsync": [c_ulonglong, c_ulonglong, c_size_t, c_void_p],
    "cuMemsetD8Async": [c_ulonglong, c_ubyte, c_size_t, c_void_p],
    "cuModuleGetFunction": [c_void_p, c_void_p, ctypes.c_char_p],
    "cuModuleLoadData": [c_void_p, ctypes.c_char_p],
    "cuModuleUnload": [c_void_p],
    "cuPointerGetAttribute": [c_void_p, c_int, c_ulonglong],
    "cuStreamCreateWithPriority": [c_void_p, c_uint, c_int],
    "cuStreamDestroy_v2": [c_void_p],
    "cuStreamQuery": [c_void_p],
    "cuStreamSynchronize": [c_void_p],
    "cuStreamWaitEvent": [c_void_p, c_void_p, c_uint],
}


def result(function: str, *arguments: Any) -> int:
    """What the function returned."""
    call = getattr(simulated.control(), function)
    if function in PARAMETERS:
        call.argtypes = PARAMETERS[function]
    return int(call(*arguments))


def call(function: str, *arguments: Any) -> None:
    got = result(function, *arguments)
    assert got == 0, f"{function}: {got}"


def enter(device: int = 0) -> None:
    """Makes the device's primary context current. Undone by leave()."""
    context = c_void_p()
    call("cuInit", 0)
    call("cuDevicePrimaryCtxRetain", byref(context), device)
    call("cuCtxSetCurrent", context)


def current() -> int:
    """The context that is."""
    found = c_void_p()
    call("cuCtxGetCurrent", byref(found))
    return found.value or 0


def leave(device: int = 0) -> None:
    call("cuCtxSetCurrent", None)
    call("cuDevicePrimaryCtxRelease_v2", device)


def stream() -> int:
    made = c_void_p()
    call("cuStreamCreateWithPriority", byref(made), 1, 0)
    return made.value or 0


def event(flags: int = 2) -> int:
    made = c_void_p()
    call("cuEventCreate", byref(made), flags)
    return made.value or 0


def elapsed(start: int, end: int) -> float:
    milliseconds = c_float()
    call("cuEventElapsedTime", byref(milliseconds), start, end)
    return milliseconds.value


def device_memory(size: int) -> int:
    pointer = c_ulonglong()
    call("cuMemAlloc_v2", byref(pointer), size)
    return pointer.value


class Pinned:
    """Host memory of the driver: copies from and to it are asynchronous."""

    def __init__(self, size: int, content: bytes = b"") -> None:
        pointer = c_void_p()
        call("cuMemAllocHost_v2", byref(pointer), size)
        self.at = pointer.value or 0
        self.memory = (c_char * size).from_address(self.at)
        self.memory[: len(content)] = content

    @property
    def content(self) -> bytes:
        return bytes(self.memory)


def copy(to: int, source: int, size: int, on: int) -> None:
    call("cuMemcpyAsync", to, source, size, on)


def write(to: int, content: bytes) -> None:
    """To device memory; done when this returns."""
    buffer = ctypes.create_string_buffer(content, len(content))
    call("cuMemcpyAsync", to, ctypes.addressof(buffer), len(content), None)  # pageable memory: it waits
    call("cuStreamSynchronize", None)


def read(source: int, size: int) -> bytes:
    buffer = ctypes.create_string_buffer(size)
    call("cuMemcpyAsync", ctypes.addressof(buffer), source, size, None)
    return buffer.raw


def handle_of(pointer: int) -> bytes:
    handle = IpcHandle()
    call("cuIpcGetMemHandle", byref(handle), pointer)
    return ctypes.string_at(byref(handle), 64)


def open_handle(handle: bytes) -> tuple[int, int]:
    """The result, and the pointer."""
    pointer = c_ulonglong()
    got = result("cuIpcOpenMemHandle_v2", byref(pointer), IpcHandle.from_buffer_copy(handle), 1)
    return got, pointer.value


def module(source: Path | str, *options: str) -> int:
    made = c_void_p()
    call("cuModuleLoadData", byref(made), simulated.image(source, *options))
    return made.value or 0


def kernel(of: int, name: str) -> int:
    made = c_void_p()
    call("cuModuleGetFunction", byref(made), of, name.encode())
    return made.value or 0


def launch(function: int, grid: int, block: int, *arguments: Any, shared: int = 0, on: int | None = None) -> int:
    """`arguments`: ctypes objects. The result."""
    pointers = (c_void_p * max(1, len(arguments)))(*(ctypes.addressof(argument) for argument in arguments))
    return result("cuLaunchKernel", function, grid, 1, 1, block, 1, 1, shared, on, pointers, None)
