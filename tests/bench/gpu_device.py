"""What ranks of tests/bench/test_gpu.py call first: the simulated device in place of a GPU."""

from __future__ import annotations

from blsrdma.gpu import compiler
from blsrdma.ucx import native
from dlrm.gpu import worker
from tests.gpu import simulated
from tests.gpu.accelerator import SimulatedAccelerator
from tests.gpu.conftest import compiled_by_gcc


def simulate() -> None:
    native.cuda.load(str(simulated.driver()))
    compiler.build = compiled_by_gcc
    worker.open_accelerator = lambda local_rank, tf32: SimulatedAccelerator()
