"""Blocks that others have disturbed are measured again, as long as there is a budget for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from bench import environment

Replies = list[dict[str, Any]]


class Again:
    """A budget of repetitions. found: for each block that was thrown away, how many cores others kept busy."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.found: list[float] = []

    def measured(self, block: Callable[[], Replies]) -> tuple[Replies, dict[str, float]]:
        """The replies of a block, each with its `cpu` seconds, and how disturbed it was."""
        while True:
            began, busy, stolen = time.monotonic(), environment.busy_seconds(), environment.stolen_seconds()
            replies = block()
            busy, wall = environment.busy_seconds() - busy, time.monotonic() - began
            own = sum(reply["cpu"] for reply in replies)
            others = max(0.0, (busy - own) / wall)
            if len(self.found) < self.budget and environment.noisy(others, wall):
                self.found.append(round(others, 3))
                continue
            stolen = (environment.stolen_seconds() - stolen) / wall
            return replies, {"others": round(others, 3), "stolen": round(max(0.0, stolen), 3)}
