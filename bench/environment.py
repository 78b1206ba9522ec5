"""The machine and the versions that numbers belong to."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.launchers import ROOT

BUSY = 0.15  # cores that others use, from which on numbers are not to be trusted


def describe() -> dict[str, Any]:
    """Everything that is the same during a run, and the load as it begins."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "cpu": _cpu(),
        "cores": cores(),
        "caches": _caches(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": load(),
        "busy_before": busy_cores(),
    }


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0))


def load() -> float:
    """Runnable processes, averaged over the last minute."""
    return round(os.getloadavg()[0], 2)


def busy_seconds() -> float:
    """Processor time of all processes and the kernel since boot, and what the hypervisor has taken."""
    user, nice, system, _, _, irq, softirq, steal = _stat()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def stolen_seconds() -> float:
    """Processor time that the hypervisor has given to others since boot; counted as busy, too."""
    return _stat()[7] / os.sysconf("SC_CLK_TCK")


def noisy(others: float, seconds: float) -> bool:
    """Whether a block of so many seconds, in which others kept `others` cores busy, is better measured again: it was
    more than BUSY, beyond what may be the clock's own ticks."""
    return others > BUSY + 2 * cores() / os.sysconf("SC_CLK_TCK") / max(seconds, 1e-3)


def _stat() -> list[int]:
    """Ticks of all processors together, by kind."""
    return [int(ticks) for ticks in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]


def busy_cores(seconds: float = 0.5) -> float:
    """That are busy now, while this process sleeps."""
    before = busy_seconds()
    time.sleep(seconds)
    return round((busy_seconds() - before) / seconds, 2)


def disturbed(others: float) -> list[str]:
    """A sentence, if other processes keep so many cores busy."""
    if others < BUSY:
        return []
    return [f"DISTURBED: other processes kept {others:.1f} of {cores()} cores busy; these numbers are worth little"]


def commit() -> str:
    """The checkout's commit, with '+' when files differ from it."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        return head + ("+" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def last_level_cache() -> int:
    """Bytes; 0 if unknown."""
    sizes = [(level, size) for level, kind, size in _cache_levels() if kind != "Instruction"]
    return max(sizes, default=(0, 0))[1]


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _cpu() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def _caches() -> str:
    return ", ".join(f"L{level} {size >> 10} KiB" for level, kind, size in _cache_levels() if kind != "Instruction")


def _cache_levels() -> list[tuple[int, str, int]]:
    found = []
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        size = (index / "size").read_text().strip().removesuffix("K")
        found.append((int((index / "level").read_text()), (index / "type").read_text().strip(), int(size) << 10))
    return found
