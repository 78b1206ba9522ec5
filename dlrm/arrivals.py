"""When batches arrive in an open loop: a pure function of rate, seed and stream, the same wherever it is computed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dlrm.errors import OptionError

if TYPE_CHECKING:
    from collections.abc import Iterator

_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_QUIET = re.compile(r"(\d+):([0-9.]+)(us|ms|s):([0-9.]+)(us|ms|s)")


@dataclass(frozen=True)
class Quiet:
    """From `begin` on, nothing arrives at `rank` for `length` seconds; what would have, and all else, comes later."""

    rank: int
    begin: float
    length: float


@dataclass(frozen=True)
class Arrivals:
    """`rate` batches a second, evenly spaced or with exponential gaps (Poisson)."""

    rate: float
    poisson: bool
    seed: int
    quiet: Quiet | None = None

    def times(self, rank: int, stream: int) -> Iterator[float]:
        """Seconds from the start of the run, increasing, without end. Ranks with one stream see the same times."""
        random = np.random.default_rng([self.seed, 0xA221, stream])
        quiet = self.quiet if self.quiet is not None and self.quiet.rank == rank else None
        number, now = 0, 0.0
        while True:
            number += 1
            now = now + float(random.exponential(1 / self.rate)) if self.poisson else number / self.rate
            yield now + quiet.length if quiet is not None and now >= quiet.begin else now


def parse_quiet(text: str) -> Quiet | None:
    """`1:2s:1s`: nothing arrives at rank 1 from second 2 on for one second. Raises OptionError."""
    if text in ("", "none"):
        return None
    match = _QUIET.fullmatch(text)
    if match is None:
        raise OptionError(f"--quiet {text!r} is not understood: wanted RANK:FROM:LENGTH such as 1:2s:1s")
    try:
        begin, length = float(match[2]) * _UNITS[match[3]], float(match[4]) * _UNITS[match[5]]
    except ValueError:
        raise OptionError(f"--quiet {text!r}: {match[2]} or {match[4]} is not a number") from None
    return Quiet(int(match[1]), begin, length)
