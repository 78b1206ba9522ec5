"""What a run tells: the JSON and the table."""

from __future__ import annotations

import platform
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

import blsrdma
from dlrm import timeline
from dlrm.metrics import percentiles

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dlrm.options import Options
    from dlrm.planner import Plan


@dataclass(frozen=True)
class Report:
    """`values`: the JSON of a run (see `assemble`); `timelines`: `Timeline.array()` of each rank, for pictures."""

    values: dict[str, Any]
    timelines: list[NDArray[np.int64]]
    difference: str | None = None  # what --verify found first


def assemble(options: Options, timelines: list[NDArray[np.int64]], stats: list[dict[str, Any]]) -> dict[str, Any]:
    """Times and traffic of a run, from every rank's timeline and exchange statistics.

    The run lasts from the common start to the last prediction of the slowest rank. Latency is from the moment a rank
    begins an iteration, in an open loop from the arrival of its batch, to its predictions being ready.
    `wait_ms[q]` is what all ranks together waited for rank q, `wait_ms_by_rank[r][q]` what rank r did (0, as is
    `max_lead_seen`, where --dist-backend is not bls, for a collective does not tell). `floor_ms` is
    how long the run had to take, given each rank's own work and delays as they were, were the exchange free (see
    timeline.floor; None in an open loop and where input is sharded).
    `phases_ms[r]` is where the time of rank r went (assemble: pooled vectors copied to where they are multiplied),
    `phases_cpu_ms` where the processor time of its serving thread did (None without --profile);
    `cpu_seconds` the processor time of all its threads; `resident_bytes` its memory at the end, files not counted.
    """
    runs = np.stack([one[:-1] for one in timelines])  # [ranks, iterations, columns]
    ends = np.stack([one[-1] for one in timelines])  # start, end, drain
    seconds = float((ends[:, 1] - ends[:, 0]).max()) / 1e9
    batches = runs.shape[1]
    waits = [[peer["wait_ns"] / 1e6 for peer in one["peers"]] for one in stats]
    carried: Counter[str] = Counter()
    transports: Counter[str] = Counter()
    for one in stats:
        for peer in one["peers"]:
            carried[peer["path"]] += peer["bytes"]
            transports[peer["transport"]] += peer["bytes"]
    bound = options.lag if options.exchange == "alltoallv" else batches  # without a collective nobody waits for a loop
    floor = timeline.floor(runs[:, :, timeline.BEFORE] / 1e9, runs[:, :, timeline.AFTER] / 1e9, ends[:, 2] / 1e9, bound)
    latencies = (runs[:, :, timeline.EMITTED] - runs[:, :, timeline.ARRIVED]) / 1e6
    modelled = options.input == "replicated" and options.arrival_rate is None
    return {
        "ranks": len(timelines),
        "lag": options.lag,
        "batches": batches,
        "seconds": seconds,
        "ms_per_iteration": seconds * 1e3 / batches,
        "floor_ms": floor * 1e3 if modelled else None,
        "latency_ms": percentiles(latencies),
        "latency_ms_by_rank": [percentiles(one) for one in latencies],
        "wait_ms": np.sum(waits, axis=0).tolist(),
        "wait_ms_by_rank": waits,
        "delay_ms_by_rank": (runs[:, :, timeline.SLEPT].sum(axis=1) / 1e6).tolist(),
        "phases_ms": [one["phases_ms"] for one in stats],
        "phases_cpu_ms": [one["phases_cpu_ms"] for one in stats] if options.profile else None,
        "cpu_seconds": [float(one["cpu_seconds"]) for one in stats],
        "resident_bytes": [int(one["resident_bytes"]) for one in stats],
        "table_bytes": [int(one["table_bytes"]) for one in stats],
        "max_lead_seen": None if stats[0]["max_lead"] is None else max(int(one["max_lead"]) for one in stats),
        "bytes_by_path": dict(carried),
        "bytes_by_transport": dict(transports),
        "window_memory_bytes": [int(one["memory_bytes"]) for one in stats],
        "settings": asdict(options) | ({} if isfinite(options.timeout) else {"timeout": "inf"}),  # JSON has no inf
        "versions": _versions(),
    }


def show(values: dict[str, Any]) -> None:
    """Print the summary as a table."""
    latency = values["latency_ms"]
    rows = [
        ("ranks, lag", f"{values['ranks']}, {values['lag']}"),
        ("samples", f"{values['samples']:,} in {values['batches']:,} batches, {values['seconds']:.3f} s"),
        ("throughput", f"{values['samples_per_s']:,.0f} samples/s, {values['ms_per_iteration']:.3f} ms/iteration"),
        ("latency", ", ".join(f"{name} {value:.2f} ms" for name, value in latency.items())),
        ("waited for", ", ".join(f"rank {rank} {wait:.0f} ms" for rank, wait in enumerate(values["wait_ms"]))),
        ("largest lead", "without bound" if (lead := values["max_lead_seen"]) is None else f"{lead} iterations"),
        ("carried", ", ".join(f"{path} {count / 1e6:.1f} MB" for path, count in values["bytes_by_path"].items())),
    ]
    if (backend := values["settings"]["dist_backend"]) != "bls":  # which does not tell whom a rank waited for
        rows[4:6] = [("exchanged by", backend)]
    for rank, phases in enumerate(values["phases_ms"]):
        rows.append((f"rank {rank} spent", ", ".join(f"{name} {spent:.0f} ms" for name, spent in phases.items())))
    for rank, phases in enumerate(values["phases_cpu_ms"] or []):
        rows.append((f"rank {rank} computed", ", ".join(f"{name} {spent:.0f} ms" for name, spent in phases.items())))
    if values["floor_ms"] is not None:
        rows.insert(3, ("floor", f"{values['floor_ms'] / values['batches']:.3f} ms/iteration, were the exchange free"))
    if values["auc"] is not None:
        rows.append(("AUC, accuracy", f"{values['auc']:.4f}, {values['accuracy']:.4f}"))
        entropy = values["normalised_entropy"]
        rows.append(("log loss, normalised", f"{values['logloss']:.4f}" + (f", {entropy:.4f}" if entropy else "")))
    rows.append(("tables", f"{values['kernel']}, {sum(values['table_bytes']) / 1e6:,.1f} MB on all ranks"))
    for rank, gpu in enumerate(values.get("gpu") or []):
        rows.append((f"rank {rank} is on", _gpu(gpu)))
    if values["pooled_sha256"] is not None:
        rows.append(("pooled", values["pooled_sha256"]))
        rows.append(("logits", values["logits_sha256"]))
    if values["exact"] is not None:
        rows.append(("exact", ("yes, " + _compared(values)) if values["exact"] else "NO"))
    table = Table(show_header=False, title="DLRM inference", title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _gpu(gpu: dict[str, Any]) -> str:
    """A rank's GPU, and what it has there."""
    rows = "all rows" if gpu["hot_rows"] == gpu["rows"] else f"{gpu['hot_rows']:,} of {gpu['rows']:,} rows"
    taken = [f"tables {gpu['table_bytes'] / 1e6:,.1f} MB ({rows})", f"windows {gpu['window_bytes'] / 1e6:,.1f} MB",
             f"batches {gpu['batch_bytes'] / 1e6:,.1f} MB"]  # fmt: skip
    taken += [f"{step} {spent:.1f} ms" for step, spent in (gpu["steps_ms"] or {}).items()]
    return f"GPU {gpu['ordinal']}, {gpu['name']}: " + ", ".join(taken)


def _compared(values: dict[str, Any]) -> str:
    if (share := values.get("largest_error_in_bounds")) is None:
        return "every bit"
    return f"every bit of pooled vectors; logits are off float64 by at most {share:.2g} of fp32's bound"


def plan_values(plan: Plan, memory: list[int]) -> dict[str, Any]:
    """A plan as JSON; its `ranks` and `replicated` are what --placement reads."""
    return plan.placement.as_json() | {
        "bytes": list(plan.bytes),
        "memory_bytes": memory,
        "lookups_per_sample": list(plan.lookups),
        "lookup_ms": list(plan.lookup_ms),
    }


def show_plan(plan: Plan, memory: list[int]) -> None:
    """Print what a plan asks of each rank; memory is that of the process now, its tables, and its windows."""
    table = Table(title="Plan", title_justify="left")
    for name in ("rank", "tables", "table bytes", "memory", "rows/sample", "lookup ms/batch"):
        table.add_column(name, justify="left" if name == "tables" else "right", overflow="fold")
    for rank, pieces in enumerate(plan.placement.pieces):
        own = " ".join(map(str, pieces))
        if plan.placement.replicated:
            own += " and " + " ".join(map(str, plan.placement.replicated))
        cells = (f"{plan.bytes[rank]:,}", f"{memory[rank] / 1e6:,.0f} MB")
        table.add_row(str(rank), own, *cells, f"{plan.lookups[rank]:.1f}", f"{plan.lookup_ms[rank]:.3f}")
    Console(stderr=True).print(table)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "blsrdma": blsrdma.__version__}
    for name in ("torch", "numpy", "ucxx-cu12", "ucxx-cu13", "libucx-cu12", "libucx-cu13"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
