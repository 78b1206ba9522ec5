"""A device that is none, for tests of kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from blsrdma.gpu import compiler
from blsrdma.gpu.device import open_device
from blsrdma.ucx import native
from tests.gpu import simulated
from tests.gpu.memory import OnDevice
from tests.gpu.rank import compiled_by_gcc

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blsrdma._native import cuda


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[cuda.Device]:
    """The simulated device, as the product's code sees it; kernels are compiled for it."""
    native.cuda.load(str(simulated.driver()))
    monkeypatch.setattr(compiler, "build", compiled_by_gcc)
    before = simulated.complaints()
    yield open_device(0)
    assert simulated.complaints() == before


@pytest.fixture
def on(device: cuda.Device) -> Iterator[OnDevice]:
    """Arrays on it."""
    arrays = OnDevice(device)
    yield arrays
    assert device.synchronize(0, 10**10)
    arrays.close()
