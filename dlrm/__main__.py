"""`python -m dlrm`: starts ranks, or is one where a launcher (torchrun, srun, mpirun or our own) has started it."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from blsrdma import launchers, spawn
from blsrdma.errors import SettingsError
from dlrm import mpiexec
from dlrm.errors import DlrmError, NotExact, OptionError
from dlrm.options import Options, parse

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 1 after an error, 2 after a wrong flag, 130 after an interrupt."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = parse(arguments)
        rank, ranks = place(options)
    except OptionError as error:
        print(f"dlrm: {error}", file=sys.stderr)
        return 2
    if rank is None:
        if options.device == "cuda" and (why := no_gpu()):
            print(f"dlrm: --device cuda: {why}", file=sys.stderr)
            return 1
        start = mpiexec.become if options.dist_backend == "mpi" else spawn.launch
        return guarded("dlrm", lambda: start("dlrm", arguments, ranks, options.threads), options.debug)
    return guarded(f"rank {rank}", lambda: run_rank(options, rank, ranks), options.debug)


def place(options: Options) -> tuple[int | None, int]:
    """This process's rank, None for the launcher, and the number of ranks. Raises OptionError where they disagree."""
    try:
        found = launchers.find()
    except SettingsError as error:
        raise OptionError(str(error)) from None
    if found is None:
        return None, options.ranks or 1
    if options.ranks not in (None, found.world_size):
        raise OptionError(
            f"--ranks {options.ranks}, but WORLD_SIZE is {found.world_size} ({found.launcher}): under a launcher leave "
            "--ranks out"
        )
    return found.rank, found.world_size


def no_gpu() -> str:
    """Why no GPU can be used here; "" where one can."""
    from blsrdma.gpu.device import unavailable

    return unavailable()


def run_rank(options: Options, rank: int, ranks: int) -> None:
    """Be a rank: run, and at rank 0 show and write the results. Raises NotExact where --verify found a difference."""
    spawn.die_with_launcher()
    logging.basicConfig(format=f"rank {rank}: %(message)s")
    logging.getLogger("dlrm").setLevel(logging.INFO)
    from blsrdma.rendezvous import store_from_environment
    from dlrm import report
    from dlrm.worker import Worker

    worker: Worker
    if options.device == "cuda":
        from dlrm.gpu.worker import GpuWorker

        worker = GpuWorker(options, rank, ranks)
    else:
        worker = Worker(options, rank, ranks)
    mpi = options.dist_backend == "mpi"  # which needs no store to meet
    store = None if mpi else store_from_environment(rank, ranks, options.timeout)
    result = worker.run(store)
    if result is None:
        return
    if options.json == "-":
        print(json.dumps(result.values, indent=2))
    else:
        report.show(result.values)
        if options.json:
            Path(options.json).write_text(json.dumps(result.values, indent=2) + "\n")
    if result.difference:
        raise NotExact(result.difference)


def guarded(who: str, action: Callable[[], None], debug: bool) -> int:
    """Do it; errors that have something to say become one line, `who: class: message`, and status 1."""
    from blsrdma.errors import BlsrdmaError

    try:
        action()
    except KeyboardInterrupt:
        return 130
    except (DlrmError, BlsrdmaError, OSError, MemoryError) as error:
        if debug or os.environ.get("BLSRDMA_DEBUG") == "1":
            raise
        text = " ".join(str(error).split())
        print(f"{who}: {type(error).__name__}: {text}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
