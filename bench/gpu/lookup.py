"""The part of `python -m bench gpu` about pooled lookups."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from typing import Any

from bench.gpu.effort import Effort, Work
from bench.gpu.teams import team


def measure(effort: Effort, report: Callable[[str], None], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Both distributions, then two tiers. Raises TeamFailed."""
    found: dict[str, Any] = {"cases": {}, "copy_bytes": effort.copy_bytes}
    with closing(team(1)) as one:
        one.ready()
        (facts,) = one.call("run", function="bench.gpu.exchange_rank:load", prepare=effort.prepare)
        found["device"] = facts
    rows = effort.rows or int(effort.memory_share * facts["total_bytes"] / (effort.tables * effort.dim * 4))
    work = Work(rows, effort.tables, effort.dim, effort.pooling, effort.samples, effort.block)
    fixed: dict[str, Any] = {"prepare": effort.prepare, "repeat": effort.repeat, "ms": effort.kernel_ms,
                             "copy_bytes": effort.copy_bytes}  # fmt: skip
    for draw in effort.draws:
        with closing(team(1)) as one:  # a process each: memory is all there again
            one.ready()
            job = asdict(replace(work, draw=draw))
            (case,) = one.call("run", function="bench.gpu.lookup_rank:measure", work=job, limit=effort.limit, **fixed)
        found["cases"][draw] = case | {"work": job}
        report(f"lookup: {draw}: measured")
        keep(found)
    with closing(team(1)) as one:
        one.ready()
        job = asdict(replace(work, rows=effort.tier_rows or rows // 4, draw=effort.draws[0]))
        (found["tiers"],) = one.call(
            "run", function="bench.gpu.lookup_rank:tiers", work=job, shares=list(effort.hot_shares), limit=effort.limit,
            **fixed,
        )  # fmt: skip
    return found
