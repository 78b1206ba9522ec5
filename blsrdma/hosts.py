"""Who shares a host with whom, and whether a process there still lives."""

from __future__ import annotations

import os
from pathlib import Path


def host_id() -> str:
    """The same on two processes iff a pid means the same to both: one kernel, one pid namespace."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"


def started(pid: int) -> int:
    """When a process began, in clock ticks since boot: tells it from a later one with the same pid. 0: no such
    process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[19])


def process_state(pid: int, began: int) -> str:
    """'alive', 'stopped' (by a signal or a debugger) or 'dead': the process `pid` that began at `began`."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return "dead"
    fields = stat.rpartition(")")[2].split()
    if int(fields[19]) != began or fields[0] in "ZX":
        return "dead"
    return "stopped" if fields[0] in "Tt" else "alive"


def open_pidfd(pid: int, began: int) -> int:
    """A pidfd of the process `pid` that began at `began`. Raises ProcessLookupError if it is gone."""
    fd = os.pidfd_open(pid)
    if started(pid) != began:
        os.close(fd)
        raise ProcessLookupError(f"process {pid} has ended")
    return fd


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
