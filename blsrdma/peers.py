"""What a rank tells the others about itself in a rendezvous, and what it makes of theirs."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING, Any

import numpy as np

from blsrdma import hosts
from blsrdma.windows import LINE_BYTES

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from blsrdma.fabric import Fabric
    from blsrdma.ucx import native


def whoami(fabric: Fabric) -> dict[str, Any]:
    """A rank's process, host and UCX address."""
    return {
        "incarnation": fabric.incarnation,
        "address": fabric.address,
        "host": hosts.host_id(),
        "pid": os.getpid(),
        "began": hosts.started(os.getpid()),
    }


def arena_facts(arena: native.Arena) -> dict[str, Any]:
    """How peers reach an arena. Writes a token into its first line: proof for a peer that what it mapped is this."""
    token = secrets.token_bytes(LINE_BYTES)
    arena.array()[:LINE_BYTES] = np.frombuffer(token, np.uint8)
    return {"rkey": arena.packed_rkey(), "base": arena.address, "token": token}


class Neighbours:
    """Which ranks are on this host, and whether they live."""

    def __init__(self, blobs: Sequence[Mapping[str, Any]], rank: int) -> None:
        self._rank = rank
        self._processes = [
            (int(blob["pid"]), int(blob["began"])) if blob["host"] == blobs[rank]["host"] else None for blob in blobs
        ]

    @property
    def here(self) -> int:
        """Ranks on this host, this one included."""
        return sum(process is not None for process in self._processes)

    def pid(self, peer: int) -> int:
        """Of a peer's process on this host; 0 for one elsewhere."""
        process = self._processes[peer]
        return 0 if process is None else process[0]

    def pidfds(self) -> list[int]:
        """A pidfd of each peer's process on this host, -1 for the others. Raises ProcessLookupError if one is gone."""
        return [
            hosts.open_pidfd(*process) if process is not None and q != self._rank else -1
            for q, process in enumerate(self._processes)
        ]

    def state(self, peer: int, silence_ns: int) -> str:
        """Whether a peer lives, in words; `silence_ns`: since its last sign of life, for one elsewhere."""
        process = self._processes[peer]
        if process is not None:
            return hosts.process_state(*process)
        return "alive" if silence_ns < 3e9 else f"silent for {silence_ns / 1e9:.0f} s: stopped or unreachable"
