"""The tests of the C++ core (tests/native), built and run plain; ci/sanitize runs them under the sanitizers too."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _run(sanitizers: str) -> None:
    built = subprocess.run(
        ["bash", "ci/native.sh", sanitizers], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False
    )
    assert built.returncode == 0, built.stderr[-4000:]
    program = built.stdout.splitlines()[-1]
    ran = subprocess.run([program], cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr
    print(ran.stdout.splitlines()[-1])


def test_plain() -> None:
    _run("")


@pytest.mark.slow
def test_under_address_sanitizer() -> None:
    _run("address,undefined")
