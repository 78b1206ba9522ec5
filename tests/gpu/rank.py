"""What a rank of tests/gpu does first."""

from __future__ import annotations

from blsrdma.ucx import native
from tests.gpu import simulated


def start() -> None:
    """Load the simulated driver in place of CUDA's, before anything else asks for one."""
    native.cuda.load(str(simulated.driver()))
