"""The allocator of a process that serves: what it has freed it keeps."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGE = 32 << 20  # the most that glibc lets a heap hold in one piece


def keep_freed() -> None:
    """Let glibc reuse freed memory of up to LARGE bytes in place of giving it back to the system.

    By default pooled vectors, megabytes in each iteration, are unmapped when they are freed, and every page of the next
    ones is faulted in and zeroed again: up to a twentieth of all time. Does nothing where there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, 1 << 30)
