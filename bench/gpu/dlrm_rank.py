"""The whole model, in every rank: what `python -m dlrm --device cuda` runs, kept for several runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from bench.gpu import device as gpu
from bench.systems.ours import Ours
from dlrm import timeline
from dlrm.gpu.worker import GpuWorker
from dlrm.options import parse

CHECKED_BATCHES = 4
_KEPT = ("ms_per_iteration", "latency_ms", "samples_per_s", "batches", "bytes_by_path", "max_lead_seen", "table_bytes",
         "pooled_sha256", "gpu")  # fmt: skip
_workers: dict[str, GpuWorker] = {}


def load(
    runtime: Ours, _progress: Callable[[int], None], prepare: str, name: str, flags: list[str], alone: bool
) -> dict[str, Any]:
    """Build a rank's part of a model on its GPU, or, `alone`, all of it in each process."""
    facts = gpu.facts(gpu.opened(prepare, runtime.rank))
    os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = str(runtime.rank), str(runtime.ranks)
    rank, ranks = (0, 1) if alone else (runtime.rank, runtime.ranks)
    _workers[name] = GpuWorker(parse(flags), rank, ranks)
    return {"device": facts}


def serve(
    runtime: Ours, _progress: Callable[[int], None], name: str, job: str, lag: int, delay: str, seed: int, look: bool
) -> dict[str, Any]:
    """All batches once. `look`: a few, with digests, and how long each step takes on the device."""
    worker = _workers[name]
    changes: dict[str, Any] = {"num_batches": CHECKED_BATCHES, "digest": True, "profile": True} if look else {}
    own = f"{job}/{runtime.rank if worker.ranks == 1 else 0}"
    report = worker.run(runtime.store, own, lag=lag, delay=delay, delay_seed=seed, **changes)
    if report is None:
        return {}
    slept = [(one[:-1, timeline.SLEPT] / 1e6).tolist() for one in report.timelines]
    return {key: report.values[key] for key in _KEPT} | {"slept_ms": slept if delay != "none" else []}
