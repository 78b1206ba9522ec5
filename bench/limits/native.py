"""Compiles limits.c with the system's compiler and runs it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

from bench.launchers import Unavailable


class Native:
    """The program, while the `with` block lasts. Raises Unavailable if there is no compiler."""

    def __init__(self) -> None:
        compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
        if compiler is None:
            raise Unavailable("no C compiler (Debian: apt-get install gcc)")
        self._folder = tempfile.TemporaryDirectory(prefix="bench-limits-")
        self._program = Path(self._folder.name) / "limits"
        source = Path(__file__).with_name("limits.c")
        done = subprocess.run(
            [compiler, "-O2", "-o", str(self._program), str(source)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            self._folder.cleanup()
            raise Unavailable(f"{compiler} could not compile limits.c: {done.stderr.strip()[-500:]}")

    def samples(self, what: str, size: int, seconds: float, *more: str) -> list[float]:
        """Nanoseconds, one number for each batch of some milliseconds. Raises Unavailable."""
        command = [str(self._program), what, str(size), str(seconds), *more]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30, check=False)
        except subprocess.TimeoutExpired:
            raise Unavailable(f"{' '.join(command[1:])} did not end") from None
        found = [float(line) for line in done.stdout.split()]
        if done.returncode or not found:
            raise Unavailable(f"{' '.join(command[1:])}: {done.stderr.strip() or 'no batch was long enough'}")
        return found

    def __enter__(self) -> Native:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._folder.cleanup()
