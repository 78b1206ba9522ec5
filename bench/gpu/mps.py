"""NVIDIA's multi-process service: kernels of several processes run on one GPU at the same time; without it they take
turns, by slices of time."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

COMMAND = "nvidia-cuda-mps-control"


class NoMps(Exception):
    """It cannot be had here, and why."""


@contextmanager
def served() -> Iterator[dict[str, str]]:
    """The environment in which processes use it; a server of our own, ended with the block. Raises NoMps."""
    if (path := shutil.which(COMMAND)) is None:
        raise NoMps(f"there is no {COMMAND} here")
    with tempfile.TemporaryDirectory(prefix="bench-mps-") as folder:
        own = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
        for each in own.values():
            Path(each).mkdir()
        environment = {**os.environ, **own}
        try:
            begun = subprocess.run([path, "-d"], env=environment, capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise NoMps(f"{COMMAND} does not start: {error}") from None
        if begun.returncode:
            raise NoMps(f"{COMMAND} does not start: {(begun.stderr or begun.stdout).strip()}")
        try:
            yield own
        finally:
            subprocess.run(
                [path], input="quit\n", env=environment, capture_output=True, text=True, timeout=30, check=False
            )


def log(own: dict[str, str]) -> str:
    """The last line of what the server wrote."""
    texts = [path.read_text(errors="replace").strip() for path in Path(own["CUDA_MPS_LOG_DIRECTORY"]).glob("*.log")]
    return next((text.splitlines()[-1] for text in texts if text), "")
