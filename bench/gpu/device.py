"""The GPU in a rank: opened, timed by its own events, and what a copy in its memory reaches."""

from __future__ import annotations

import ctypes
import importlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blsrdma.errors import GpuError
from blsrdma.gpu.device import open_device
from blsrdma.ucx import native

DEADLINE_NS = 60_000_000_000


def opened(prepare: str, rank: int = 0) -> native.cuda.Device:
    """This rank's device. `prepare`, "" or a function "module:name", is called before anything else uses one (tests put
    another driver in place)."""
    if prepare:
        module, name = prepare.split(":")
        getattr(importlib.import_module(module), name)()
    return open_device(rank % native.cuda.device_count())


def facts(device: native.cuda.Device) -> dict[str, Any]:
    """What numbers belong to."""
    return {
        "name": device.name, "capability": list(device.capability), "multiprocessors": device.multiprocessors,
        "total_bytes": device.total_bytes, "driver": native.cuda.load(), "devices": native.cuda.device_count(),
    }  # fmt: skip


class Clock:
    """Times what is put on its stream, between two events."""

    def __init__(self, device: native.cuda.Device) -> None:
        self.device, self._stream = device, device.stream()
        self._events = device.event(timing=True), device.event(timing=True)
        self.stream = self._stream.address

    def ms(self, work: Callable[[int], object], times: int, first: int = 0) -> float:
        """Milliseconds of one of `times` calls work(i), i from `first`."""
        begin, end = self._events
        self.device.record(begin, self.stream)
        for i in range(first, first + times):
            work(i)
        self.device.record(end, self.stream)
        if not self.device.finish(end, DEADLINE_NS):
            raise GpuError(f"the GPU did not finish {times} launches within {DEADLINE_NS // 10**9} s")
        return end.elapsed_ms(begin) / times

    def settle(self) -> None:
        """Wait until the stream is empty."""
        if not self.device.synchronize(self.stream, DEADLINE_NS):
            raise GpuError(f"the GPU did not come to rest within {DEADLINE_NS // 10**9} s")

    def enough(self, work: Callable[[int], object], ms: float) -> int:
        """How many calls take about so long; the first ones, which compile and load, do not count."""
        self.ms(work, 2)
        return max(1, min(10_000, int(ms / max(1e-3, self.ms(work, 3)))))


def copy_gbs(clock: Clock, size: int, repeat: int) -> list[float]:
    """GB/s, read and written, of copies of `size` bytes within the device's memory."""
    device = clock.device
    source, target = device.memory(size), device.memory(size)
    try:
        device.fill(source.address, 1, size, clock.stream)

        def copy(_: int) -> None:
            device.copy(target.address, source.address, size, clock.stream)

        times = clock.enough(copy, 20.0)
        return [2 * size / clock.ms(copy, times) / 1e6 for _ in range(repeat)]
    finally:
        source.close()
        target.close()


def host_gbs(clock: Clock, size: int, repeat: int) -> list[float]:
    """GB/s of copies from page-locked host memory to the device."""
    device = clock.device
    source, target = device.host_memory(size), device.memory(size)
    try:
        return [size / clock.ms(lambda _: device.copy(target.address, source.address, size, clock.stream), 3) / 1e6
                for _ in range(repeat)]  # fmt: skip
    finally:
        source.close()
        target.close()


def host_bytes(address: int, size: int) -> NDArray[np.uint8]:
    """A view of host memory."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def wall_ms(work: Callable[[], object]) -> float:
    """Of the host's clock."""
    began = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - began) / 1e6
