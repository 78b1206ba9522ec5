"""Starts the ranks of a run as processes of this machine, and sees to their ends.

Each rank is `python -m MODULE ARGS` with torchrun's environment variables set, so that a rank need not know who started
it. The launcher hosts the store. The kernel ends the ranks when the launcher dies (PR_SET_PDEATHSIG), however it dies.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from blsrdma.errors import RankFailed

if TYPE_CHECKING:
    from collections.abc import Sequence

GRACE_SECONDS = 5.0  # for the other ranks to end with an error of their own
KILL_SECONDS = 2.0  # between SIGTERM and SIGKILL
_PARENT = "_BLSRDMA_LAUNCHER"
_PR_SET_PDEATHSIG = 1


def launch(module: str, arguments: Sequence[str], ranks: int, threads: int = 1) -> None:
    """Run `ranks` ranks of `python -m module arguments` to their end.

    Raises RankFailed naming the first rank that ended badly; the others have ended by then. Ends them all, too, when
    interrupted or terminated itself.
    """
    listener = socket.create_server(("127.0.0.1", 0), backlog=ranks + 8)
    port = listener.getsockname()[1]
    command = [sys.executable, "-m", module, *arguments]
    previous = signal.signal(signal.SIGTERM, _terminated)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(ranks):  # one by one, so that those that did start are ended if one does not
            processes.append(  # noqa: PERF401
                subprocess.Popen(command, env=_environment(rank, ranks, port, threads))
            )
        from torch.distributed import TCPStore  # here, because importing torch takes as long as the ranks' own start

        store = TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(minutes=5),
            master_listen_fd=listener.detach(),
        )
        failed = _wait(processes)
        del store
    finally:
        _end(processes)
        signal.signal(signal.SIGTERM, previous)
        listener.close()
    if failed is not None:
        status = processes[failed].returncode
        raise RankFailed(f"rank {failed} {_how(status)}", failed, status)


def die_with_launcher() -> None:
    """Called by a rank at its start: if `launch` started it, it is killed when the launcher dies."""
    parent = os.environ.get(_PARENT)
    if parent is None:
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != int(parent):  # it died before the call
        sys.exit(1)


def _environment(rank: int, ranks: int, port: int, threads: int) -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": str(threads),
        "GLOO_SOCKET_IFNAME": "lo",  # else gloo asks the resolver for this host's name
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        _PARENT: str(os.getpid()),
    }


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int | None:
    """Wait for all to end; after the first bad end the others have GRACE_SECONDS. The rank of that end, or None."""
    failed: int | None = None
    deadline = float("inf")
    while time.monotonic() < deadline:
        running = False
        for rank, process in enumerate(processes):
            status = process.poll()
            running |= status is None
            if status and failed is None:
                failed, deadline = rank, time.monotonic() + GRACE_SECONDS
        if not running:
            break
        time.sleep(0.02)
    return failed


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """End whatever still runs."""
    for process in processes:
        if process.poll() is None:
            process.terminate()
    deadline = time.monotonic() + KILL_SECONDS
    for process in processes:
        try:
            process.wait(max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"


def _terminated(*_: object) -> None:
    sys.exit(128 + signal.SIGTERM)
