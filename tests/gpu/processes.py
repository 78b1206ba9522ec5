"""Processes with a simulated driver of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def child(code: str, *, text: str = "", **environment: str) -> subprocess.Popen[str]:
    """A process with a driver of its own. Its standard input and output are pipes."""
    process = subprocess.Popen(
        [sys.executable, "-c", "from tests.gpu.calls import *\nfrom tests.gpu import simulated\n" + code],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if "CUDA" not in name} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    process.stdin.write(text)
    process.stdin.flush()
    return process


def output(process: subprocess.Popen[str], returncode: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=60)
    assert process.returncode == returncode, (process.returncode, out, err)
    return out, err
