"""The part of `python -m bench gpu` about the whole model: MLPerf v1's shape, its tables scaled to memory.

What each half costs is measured alone, by the same engine: the dense part with tables of one row, in as many processes
as there are ranks, each with its part of every batch, so that nothing is exchanged; lookups and exchange with MLPs of
one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from typing import Any

from bench.gpu import mps
from bench.gpu.effort import Effort
from bench.gpu.teams import team, words
from bench.team import Team, TeamFailed

# Rows of Criteo's Terabyte tables where at most 40 million are kept of each, as in MLPerf v1.
ROWS = (39884406, 39043, 17289, 7420, 20263, 3, 7120, 1543, 63, 38532951, 2953546, 403346, 10, 2208, 11938, 155, 4, 976,
        14, 39979771, 25641295, 39664984, 585935, 12972, 108, 36)  # fmt: skip
MODELS = ("whole", "dense", "exchange")
_RANK = "bench.gpu.dlrm_rank"
_JOBS = count()


@dataclass(frozen=True)
class Entry:
    """One line of the table."""

    name: str
    model: str  # of MODELS
    lag: int = 0
    delay: str = "none"


def entries(effort: Effort) -> list[Entry]:
    """What is measured, in the order of the table."""
    return [
        Entry("dense alone", "dense"),
        Entry("lookups and exchange alone", "exchange", effort.lag),
        Entry("whole, lag 0", "whole"),
        Entry(f"whole, lag {effort.lag}", "whole", effort.lag),
        Entry("delayed, lag 0", "whole", 0, effort.delay),
        Entry(f"delayed, lag {effort.lag}", "whole", effort.lag, effort.delay),
    ]


def scaled(room_bytes: int, dim: int) -> tuple[int, ...]:
    """ROWS, the large tables so much smaller that all fit into so many bytes."""
    room, limit = room_bytes // (4 * dim), max(ROWS)
    while sum(min(each, limit) for each in ROWS) > room and limit > 1:
        limit = limit * 9 // 10
    return tuple(min(each, limit) for each in ROWS)


def flags(effort: Effort, model: str, rows: tuple[int, ...], processes: int) -> list[str]:
    """Those of `python -m dlrm`."""
    dim = effort.model_dim
    bottom, top = (f"13-{dim}", "1") if model == "exchange" else (f"13-{effort.bottom}-{dim}", effort.top)
    sizes = (1,) * len(rows) if model == "dense" else rows
    given: dict[str, object] = {
        "device": "cuda", "arch-mlp-bot": bottom, "arch-mlp-top": top, "arch-sparse-feature-size": dim,
        "arch-embedding-size": "-".join(map(str, sizes)), "num-indices-per-lookup": 1,
        "mini-batch-size": effort.batch // (processes if model == "dense" else 1), "num-batches": effort.batches,
        "data-generation": "random", "placement": "greedy",
    }  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    return [*words, "--num-indices-per-lookup-fixed"]


def measure(
    effort: Effort, report: Callable[[str], None], keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:  # fmt: skip
    """With MPS where there is one and it works, else without. Raises TeamFailed."""
    try:
        with mps.served() as environment:
            return _measure(effort, environment, {}, report, keep)
    except (mps.NoMps, TeamFailed) as reason:
        why = words(reason)
        report(f"dlrm: without MPS: {why}")
    return _measure(effort, {}, {"MPS": why}, report, keep)


def _measure(
    effort: Effort, environment: Mapping[str, str], skipped: dict[str, str], report: Callable[[str], None],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:  # fmt: skip
    """Rounds over the entries."""
    ranks, rows = effort.ranks[0], scaled(effort.dlrm_bytes, effort.model_dim)
    found: dict[str, Any] = {
        "rows": list(rows), "ranks": ranks, "runs": {}, "looked": {}, "skipped": skipped, "mps": bool(environment),
        "dim": effort.model_dim, "batch": effort.batch, "batches": effort.batches, "lag": effort.lag,
        "delay": effort.delay,
    }  # fmt: skip
    with closing(team(ranks, more=environment)) as servers:
        servers.ready()
        for model in MODELS:
            replies = servers.call(
                "run", function=f"{_RANK}:load", prepare=effort.prepare, name=model, alone=model == "dense",
                flags=flags(effort, model, rows, ranks), limit=effort.limit,
            )  # fmt: skip
            found["device"] = replies[0]["device"]
            report(f"dlrm: {model}: loaded")
        chosen = entries(effort)
        for entry in chosen[2:4]:  # the whole, at both lags
            found["looked"][entry.name] = _run(servers, entry, effort, 0, look=True)
        digests = {one["digest"] for one in found["looked"].values()}
        if len(digests) != 1:
            raise TeamFailed(f"lags pooled different vectors out of the same batches: {sorted(digests)}")
        for repetition in range(effort.runs):
            for k in range(len(chosen)):
                entry = chosen[(k + repetition) % len(chosen)]
                found["runs"].setdefault(entry.name, []).append(_run(servers, entry, effort, repetition))
            keep(found)
            report(f"dlrm: round {repetition + 1} of {effort.runs}")
    found["runs"] = {entry.name: found["runs"][entry.name] for entry in chosen}
    return found


def _run(servers: Team, entry: Entry, effort: Effort, seed: int, look: bool = False) -> dict[str, Any]:
    """One run of an entry; with `look` a short one that says more."""
    replies = servers.call(
        "run", function=f"{_RANK}:serve", name=entry.model, job=f"gpu-{next(_JOBS)}", lag=entry.lag, delay=entry.delay,
        seed=seed, look=look, limit=effort.limit,
    )  # fmt: skip
    told = [reply for reply in replies if reply]
    batches = told[0]["batches"]
    steps = told[0]["gpu"][0]["steps_ms"] or {}
    return {
        "ms": max(one["ms_per_iteration"] for one in told), "p99": max(one["latency_ms"]["p99"] for one in told),
        "samples_per_s": sum(one["samples_per_s"] for one in told), "batches": batches, "lag": entry.lag,
        "paths": told[0]["bytes_by_path"], "lead": told[0]["max_lead_seen"], "slept_ms": told[0]["slept_ms"],
        "table_bytes": sum(told[0]["table_bytes"]), "digest": told[0]["pooled_sha256"],
        "steps_ms": {step: spent / batches for step, spent in steps.items()},
    }  # fmt: skip
