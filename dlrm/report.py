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


@dataclass(frozen=True)
class Report:
    """`values`: the JSON of a run (see `assemble`); `timelines`: `Timeline.array()` of each rank, for pictures."""

    values: dict[str, Any]
    timelines: list[NDArray[np.int64]]
    difference: str | None = None  # what --verify found first


def assemble(options: Options, timelines: list[NDArray[np.int64]], stats: list[dict[str, Any]]) -> dict[str, Any]:
    """Times and traffic of a run, from every rank's timeline and exchange statistics.

    The run lasts from the common start to the last prediction of the slowest rank. Latency is from the moment a rank
    begins an iteration to its predictions being ready. `wait_ms[q]` is what all ranks together waited for rank q,
    `wait_ms_by_rank[r][q]` what rank r did. `floor_ms` is how long the run had to take, given each rank's own work and
    delays as they were, were the exchange free (see timeline.floor).
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
    floor = timeline.floor(
        runs[:, :, timeline.BEFORE] / 1e9, runs[:, :, timeline.AFTER] / 1e9, ends[:, 2] / 1e9, options.lag
    )
    latencies = (runs[:, :, timeline.EMITTED] - runs[:, :, timeline.BEGIN]) / 1e6
    return {
        "ranks": len(timelines),
        "lag": options.lag,
        "batches": batches,
        "seconds": seconds,
        "ms_per_iteration": seconds * 1e3 / batches,
        "floor_ms": floor * 1e3,
        "latency_ms": percentiles(latencies),
        "wait_ms": np.sum(waits, axis=0).tolist(),
        "wait_ms_by_rank": waits,
        "delay_ms_by_rank": (runs[:, :, timeline.SLEPT].sum(axis=1) / 1e6).tolist(),
        "max_lead_seen": max(int(one["max_lead"]) for one in stats),
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
        ("floor", f"{values['floor_ms'] / values['batches']:.3f} ms/iteration, were the exchange free"),
        ("latency", ", ".join(f"{name} {value:.2f} ms" for name, value in latency.items())),
        ("waited for", ", ".join(f"rank {rank} {wait:.0f} ms" for rank, wait in enumerate(values["wait_ms"]))),
        ("largest lead", f"{values['max_lead_seen']} iterations"),
        ("carried", ", ".join(f"{path} {count / 1e6:.1f} MB" for path, count in values["bytes_by_path"].items())),
    ]
    if values["auc"] is not None:
        rows.append(("AUC, accuracy", f"{values['auc']:.4f}, {values['accuracy']:.4f}"))
    if values["pooled_sha256"] is not None:
        rows.append(("pooled", values["pooled_sha256"]))
        rows.append(("logits", values["logits_sha256"]))
    if values["exact"] is not None:
        rows.append(("exact", "yes, every bit" if values["exact"] else "NO"))
    table = Table(show_header=False, title="DLRM inference", title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "blsrdma": blsrdma.__version__}
    for name in ("torch", "numpy", "ucxx-cu12", "ucxx-cu13", "libucx-cu12", "libucx-cu13"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
