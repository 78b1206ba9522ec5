"""What a rank of tests/gpu does first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blsrdma.gpu import compiler
from blsrdma.gpu.compiler import Compiled
from blsrdma.ucx import native
from tests.gpu import simulated

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def start() -> None:
    """Load the simulated driver in place of CUDA's, before anything else asks for one; kernels are compiled for it."""
    native.cuda.load(str(simulated.driver()))
    compiler.build = compiled_by_gcc


def compiled_by_gcc(source: Path, defines: Mapping[str, str | int], capability: compiler.Capability) -> Compiled:
    """In place of `compiler.nvrtc`: what the simulated device runs."""
    return Compiled(simulated.image(source, *(f"-D{name}={value}" for name, value in defines.items())), "")
