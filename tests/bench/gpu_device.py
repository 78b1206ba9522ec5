"""What ranks of tests/bench/test_gpu.py call first: the simulated device in place of a GPU."""

from __future__ import annotations

import os

from dlrm.gpu import worker
from tests.gpu.accelerator import SimulatedAccelerator
from tests.gpu.rank import start


def simulate() -> None:
    start()


def simulate_torch() -> None:
    """Torch, too, which computes in the device's place (see tests.gpu.accelerator)."""
    os.environ["SIMULATED_CUDA_PROTECT"] = "0"
    worker.open_accelerator = lambda local_rank, tf32: SimulatedAccelerator()
    start()
