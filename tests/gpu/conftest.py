"""Devices for tests of kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from blsrdma.gpu import compiler
from blsrdma.gpu.device import open_device
from blsrdma.ucx import native
from tests.gpu import calls as cu
from tests.gpu import simulated
from tests.gpu.memory import OnDevice
from tests.gpu.rank import REAL, compiled_by_gcc

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blsrdma._native import cuda


@pytest.fixture(params=["simulated", pytest.param("real", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[cuda.Device]:
    """A device as the product's code sees it: simulated, with kernels that g++ compiles, or a real one."""
    real = request.param == "real"
    native.cuda.load(*([] if real else [str(simulated.driver())]))
    found = open_device(0)
    if real == found.name.startswith("Simulated"):
        pytest.skip("this process has another driver: -m gpu is for the real one, -m 'not gpu' for the simulated one")
    if real:
        yield found
        return
    monkeypatch.setattr(compiler, "build", compiled_by_gcc)
    before = simulated.complaints()
    yield found
    assert simulated.complaints() == before


@pytest.fixture(params=["simulated", pytest.param("real", marks=pytest.mark.gpu)])
def where(request: pytest.FixtureRequest) -> dict[str, str]:
    """The environment of ranks whose devices are simulated, or real."""
    return dict(REAL) if request.param == "real" else {}


@pytest.fixture
def a_context(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A context of the simulated device is current, for tests that call the driver themselves."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before = simulated.complaints()
    cu.enter()
    yield
    cu.leave()
    assert simulated.complaints() == before


@pytest.fixture
def on(device: cuda.Device) -> Iterator[OnDevice]:
    """Arrays on it."""
    arrays = OnDevice(device)
    yield arrays
    assert device.synchronize(0, 10**10)
    arrays.close()
