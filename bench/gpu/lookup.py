"""The part of `python -m bench gpu` about pooled lookups."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

from bench.gpu.effort import Effort, Work
from bench.gpu.teams import team


def measure(effort: Effort, report: Callable[[str], None], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Each distribution, then two tiers; in one process. Raises TeamFailed."""
    found: dict[str, Any] = {"cases": {}, "copy_bytes": effort.copy_bytes}
    fixed: dict[str, Any] = {"prepare": effort.prepare, "repeat": effort.repeat, "ms": effort.kernel_ms,
                             "copy_bytes": effort.copy_bytes, "limit": effort.limit}  # fmt: skip
    with closing(team(1)) as one:
        one.ready()
        (found["device"],) = one.call("run", function="bench.gpu.exchange_rank:load", prepare=effort.prepare)
        rows = effort.rows or int(
            effort.memory_share * found["device"]["total_bytes"] / (effort.tables * effort.dim * 4)
        )
        work = Work(rows, effort.tables, effort.dim, effort.pooling, effort.samples, effort.block)
        for draw in effort.draws:
            job = asdict(replace(work, draw=draw))
            (case,) = one.call("run", function="bench.gpu.lookup_rank:measure", work=job, **fixed)
            found["cases"][draw] = case | {"work": job}
            report(f"lookup: {draw}: measured")
            keep(found)
        job = asdict(replace(work, rows=effort.tier_rows, draw=effort.draws[0]))
        (found["tiers"],) = one.call(
            "run", function="bench.gpu.lookup_rank:tiers", work=job, shares=list(effort.hot_shares), **fixed
        )
    return found
