"""What a rank of tests/gpu does first."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from blsrdma.gpu import compiler
from blsrdma.gpu.compiler import Compiled
from blsrdma.ucx import native
from tests.gpu import simulated

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


REAL = {"TESTS_ON_A_GPU": "1"}  # in the environment of ranks


def start() -> None:
    """Load the simulated driver in place of CUDA's, before anything else asks for one; kernels are compiled for it."""
    if os.environ.get("TESTS_ON_A_GPU") == "1":
        return
    native.cuda.load(str(simulated.driver()))
    compiler.build = compiled_by_gcc


def compiled_by_gcc(source: Path, defines: Mapping[str, str | int], capability: compiler.Capability) -> Compiled:
    """In place of `compiler.nvrtc`: what the simulated device runs."""
    return Compiled(simulated.image(source, *(f"-D{name}={value}" for name, value in defines.items())), "")
