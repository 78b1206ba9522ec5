"""Memory of the batches that are on their way on one rank: what is uploaded of them, and what comes back.

A slot is one batch's from its upload until its predictions have been handed out, when nothing on the device uses it any
more: so it is filled again without waiting for anything.
"""

from __future__ import annotations

from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING

from dlrm.gpu.staging import GROWTH, Staged, Uploaded
from dlrm.gpu.tiers import padded

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blsrdma.gpu.device import Device

STEPS = ("lookup", "bottom", "interaction", "top")  # on the device


class Slot:
    """One batch's memory. The events: its data are on the device, its bottom MLP is done, its predictions are here."""

    def __init__(
        self, device: Device, upload_bytes: int, samples: int, row_bytes: int, replicated: int, kept: int, timed: bool
    ) -> None:
        """`row_bytes` of a vector; `replicated` vectors a sample are pooled here, `kept` copied to the host; `timed`:
        count the time of its steps on the device."""
        self._device = device
        self._there = device.memory(padded(max(upload_bytes, 1)))
        self.bottoms = device.memory(max(1, samples * row_bytes))
        self.replicated = device.memory(max(1, samples * replicated * row_bytes))
        self.results = device.host_memory(max(1, 2 * 4 * samples))  # logits, then probabilities
        self.kept = device.host_memory(max(1, samples * kept * row_bytes))
        self.uploaded, self.bottom, self.finished = (device.event() for _ in range(3))
        self._clocks = {step: (device.event(True), device.event(True)) for step in STEPS} if timed else {}
        self._steps: list[str] = []  # that were timed

    @property
    def device_bytes(self) -> int:
        """GPU memory of this slot."""
        return self._there.size + self.bottoms.size + self.replicated.size

    def upload(self, staged: Staged, stream: int) -> Uploaded:
        """Put a batch's data on their way; `uploaded` follows them. Where they will be."""
        if staged.nbytes > self._there.size:
            self._there.close()
            self._there = self._device.memory(padded(int(staged.nbytes * GROWTH)))
        self._device.copy(self._there.address, staged.memory.host, staged.nbytes, stream)
        self._device.record(self.uploaded, stream)
        return staged.data.moved(self._there.address - staged.memory.host)

    @contextmanager
    def step(self, name: str, stream: int) -> Iterator[None]:
        """What is put on the stream inside is one of STEPS."""
        if not self._clocks:
            yield
            return
        self._device.record(self._clocks[name][0], stream)
        yield
        self._device.record(self._clocks[name][1], stream)
        self._steps.append(name)

    def elapsed(self) -> list[tuple[str, float]]:
        """Steps, all of them done, and their milliseconds on the device; begins anew."""
        found = [(name, self._clocks[name][1].elapsed_ms(self._clocks[name][0])) for name in self._steps]
        self._steps.clear()
        return found

    def close(self) -> None:
        """Give all back. Nothing on the device may use it any more."""
        for memory in (self._there, self.bottoms, self.replicated, self.results, self.kept):
            memory.close()
        for event in (self.uploaded, self.bottom, self.finished, *chain.from_iterable(self._clocks.values())):
            event.close()
