"""`python -m bench peers`: MPICH and Open MPI, each with mpi4py in an environment of its own (in one environment they
overwrite each other's files)."""

from __future__ import annotations

import argparse
import subprocess
import sys

from bench.launchers import ROOT, Interpreters, Unavailable

_CONSTRAINTS = ROOT / "ci/constraints.txt"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "peers", help="set up MPICH and Open MPI in .venv-mpich and .venv-openmpi", description=__doc__
    )
    parser.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Makes what is missing."""
    for kind in ("mpich", "openmpi"):
        try:
            print(f"{kind}: {Interpreters().find(kind)}")
            continue
        except Unavailable:
            print(f"{kind}: installing into .venv-{kind}")
        folder = ROOT / f".venv-{kind}"
        pip = [str(folder / "bin/python"), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
        constraints = ["--constraint", str(_CONSTRAINTS)] if _CONSTRAINTS.exists() else []
        try:
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
            subprocess.run([*pip, *constraints, "numpy", "mpi4py", kind], check=True)
            print(f"{kind}: {Interpreters().find(kind)}")
        except (subprocess.CalledProcessError, Unavailable) as error:
            print(f"{kind}: {error}", file=sys.stderr)
            return 1
    return 0
