"""How the ranks of each runtime are started: interpreter, launcher, settings."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Bytes of blsrdma by other ways than the default (direct stores on one host).
TRANSPORTS = {
    "default": {},
    "puts": {"BLSRDMA_DIRECT": "0"},
    "posix-puts": {"UCX_TLS": "posix,self", "BLSRDMA_DIRECT": "0"},
    "sysv-puts": {"UCX_TLS": "sysv,self", "BLSRDMA_DIRECT": "0"},
    "cma-puts": {"UCX_TLS": "posix,cma,self", "BLSRDMA_DIRECT": "0"},
    "tcp": {"UCX_TLS": "tcp,self", "BLSRDMA_DIRECT": "0"},  # large messages too, as between hosts
    "one-tcp": {"UCX_TLS": "tcp,self", "UCX_NET_DEVICES": "lo", "BLSRDMA_DIRECT": "0"},  # a single connection
}


class Unavailable(Exception):
    """A system that cannot run here, and why."""


@dataclass(frozen=True)
class Launch:
    """What to start: one command for all ranks (a launcher's), or one process for each rank."""

    command: list[str]
    each: bool
    environment: Mapping[str, str]
    settings: list[str] = field(default_factory=list)  # what to say about it in a report


@dataclass(frozen=True)
class Interpreters:
    """Pythons that have mpi4py with one MPI each; None: look for one."""

    mpich: str | None = None
    openmpi: str | None = None

    def find(self, kind: str) -> str:
        """Given by option, by environment, made by `python -m bench peers`, or this one. Raises Unavailable."""
        given = getattr(self, kind) or os.environ.get(f"BENCH_{kind.upper()}_PYTHON")
        candidates = [given] if given else [str(ROOT / f".venv-{kind}/bin/python"), sys.executable]
        for python in candidates:
            if _has(python, "mpi4py", kind) and launcher(python).exists():
                return python
        where = given or f".venv-{kind} or this Python"
        raise Unavailable(f"no mpi4py with the wheel {kind} in {where}: make it with `python -m bench peers`")


def launcher(python: str) -> Path:
    """The mpiexec that belongs to an interpreter."""
    return Path(python).absolute().parent / "mpiexec"


def plan(runtime: str, ranks: int, cores: int, interpreters: Interpreters, transport: str = "default") -> Launch:
    """How to start `ranks` ranks of a runtime. Raises Unavailable with the reason."""
    common = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": _python_path()}
    if runtime in ("bls", "bls-torch", "gloo", "nccl"):
        return _torch(runtime, ranks, common | (TRANSPORTS[transport] if runtime.startswith("bls") else {}))
    if runtime == "mpich":
        return _mpich(ranks, cores, interpreters.find("mpich"), common)
    python = interpreters.find("openmpi")
    if runtime == "openmpi-dlrm":  # which needs torch, too: this Python, with that one's launcher and mpi4py
        common["PYTHONPATH"] += os.pathsep + _packages(python)
        return _openmpi(runtime, ranks, cores, launcher(python), sys.executable, common)
    return _openmpi(runtime, ranks, cores, launcher(python), python, common)


def _torch(runtime: str, ranks: int, common: dict[str, str]) -> Launch:
    if runtime == "nccl":
        import torch

        if (gpus := torch.cuda.device_count()) < ranks:
            raise Unavailable(f"NCCL wants one GPU for each rank: {ranks} ranks, {gpus} GPUs")
    extra = {"GLOO_SOCKET_IFNAME": "lo"}  # of bls too, which may run a model over gloo
    command = [sys.executable, "-m", "bench.rank", runtime]
    # The resolver is asked for the name of every address; where no name server answers, each question takes 5 s.
    return Launch(command, True, common | extra | {"RES_OPTIONS": os.environ.get("RES_OPTIONS", "timeout:1")})


def _mpich(ranks: int, cores: int, python: str, common: dict[str, str]) -> Launch:
    settings = {"MPIR_CVAR_POLLS_BEFORE_YIELD": "1"} if ranks > cores else {}
    command = [str(launcher(python)), "-n", str(ranks), python, "-m", "bench.rank", "mpich"]
    return Launch(command, False, common | settings, [f"{name}={value}" for name, value in settings.items()])


def _openmpi(runtime: str, ranks: int, cores: int, mpiexec: Path, python: str, common: dict[str, str]) -> Launch:
    # Told to oversubscribe, Open MPI yields; else it spins, which is faster while every rank has a core and a
    # catastrophe (a scheduler slice for every message) when not.
    crowded = ranks > cores
    place = ["--map-by", ":OVERSUBSCRIBE"] if crowded else ["--host", f"localhost:{ranks}"]
    options = [*place, "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1" if crowded else "0"]
    if runtime == "openmpi-ucx":
        options += ["--mca", "pml", "ucx", "--mca", "pml_ucx_tls", "any", "--mca", "pml_ucx_devices", "any"]
    else:
        options += ["--mca", "pml", "ob1", "--mca", "btl", "self,sm"]
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    command = [str(mpiexec), *root, *options, "-n", str(ranks), python, "-m", "bench.rank", runtime]
    exports = [item for name in common for item in ("-x", name)]
    command[1:1] = exports
    return Launch(command, False, common, [" ".join(options)])


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))


def _packages(python: str) -> str:
    """Where an interpreter has mpi4py."""
    code = "import importlib.util; print(importlib.util.find_spec('mpi4py').origin)"
    found = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    return str(Path(found.strip()).parent.parent)


def _has(python: str, *packages: str) -> bool:
    code = f"from importlib.metadata import version\nfor name in {packages!r}: version(name)"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
