"""The whole model, in every rank: what `python -m dlrm --device cuda` runs, kept for several runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.gpu import device as gpu
from bench.systems.ours import Ours
from dlrm.options import parse
from dlrm.worker import Worker

CHECKED_BATCHES = 4
_KEPT = ("ms_per_iteration", "latency_ms", "samples_per_s", "floor_ms", "batches", "bytes_by_path", "max_lead_seen",
         "table_bytes", "phases_ms", "pooled_sha256")  # fmt: skip
_workers: dict[str, Worker] = {}


def load(
    runtime: Ours, _progress: Callable[[int], None], prepare: str, name: str, flags: list[str], alone: bool
) -> dict[str, Any]:
    """Build a rank's part of a model, or, `alone`, all of it in each process."""
    facts = gpu.facts(gpu.opened(prepare, runtime.rank)) if "cuda" in flags else {}
    rank, ranks = (0, 1) if alone else (runtime.rank, runtime.ranks)
    _workers[name] = Worker(parse(flags), rank, ranks)
    return {"device": facts}


def serve(
    runtime: Ours, _progress: Callable[[int], None], name: str, job: str, lag: int, delay: str, digest: bool
) -> dict[str, Any]:
    """All batches once; with a digest, a few."""
    worker = _workers[name]
    changes: dict[str, Any] = {"num_batches": CHECKED_BATCHES} if digest else {}
    own = f"{job}/{runtime.rank if worker.ranks == 1 else 0}"
    report = worker.run(runtime.store, own, lag=lag, delay=delay, digest=digest, **changes)
    return {} if report is None else {key: report.values[key] for key in _KEPT}
