"""The launcher for --dist-backend mpi, which becomes an mpiexec.

MPI wants its own launcher: ranks that something else started would each be alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dlrm.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Sequence


def become(module: str, arguments: Sequence[str], ranks: int, threads: int) -> None:
    """Replace this process by an mpiexec that starts `ranks` ranks of `python -m module arguments` on this machine.

    Raises OptionError where there is none.
    """
    require()
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        raise OptionError("--dist-backend mpi: there is no mpiexec: pip install 'blsrdma[mpi]'")
    version = subprocess.run([mpiexec, "--version"], capture_output=True, text=True, check=False)
    crowded = ranks > len(os.sched_getaffinity(0))  # then ranks that wait have to give their core away
    options = []
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if "Open MPI" in version.stdout + version.stderr:
        options = ["--bind-to", "none", "--map-by", ":OVERSUBSCRIBE", *(["--allow-run-as-root"] * (os.geteuid() == 0))]
        options += ["--mca", "mpi_yield_when_idle", str(int(crowded))]
    elif crowded:
        os.environ.setdefault("MPIR_CVAR_POLLS_BEFORE_YIELD", "1")
    sys.stdout.flush()
    os.execv(mpiexec, [mpiexec, *options, "-n", str(ranks), sys.executable, "-m", module, *arguments])


def require() -> None:
    """Raise OptionError where there is no mpi4py."""
    if not find_spec("mpi4py"):
        raise OptionError("--dist-backend mpi wants mpi4py: pip install 'blsrdma[mpi]'")
