"""The ranks' side of `bench.inference`: what `bench.rank` runs there. A process may serve alone, too."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bench.control import Message
from bench.plain_dlrm import PlainDlrm
from dlrm import timeline
from dlrm.options import parse
from dlrm.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.systems.base import Runtime
    from bench.systems.ours import Ours

TOLERANCE = 1e-4  # of probabilities, ours against plain torch's
CHECKED_BATCHES = 4
_CORES = sorted(os.sched_getaffinity(0))
_workers: dict[str, Worker] = {}


def worker(name: str) -> Worker:
    """That `load` has made."""
    return _workers[name]


def load(runtime: Runtime, _progress: Callable[[int], None], name: str, flags: list[str], alone: bool) -> Message:
    """Build a rank's part of a model, or all of it in each process."""
    rank, ranks = (0, 1) if alone else (runtime.rank, runtime.ranks)
    _workers[name] = worker = Worker(parse(flags), rank, ranks)
    return {"table_bytes": worker.tables.nbytes()}


def check(runtime: Ours, _progress: Callable[[int], None], name: str, job: str) -> Message:
    """Digests of the first batches."""
    report = _run(runtime, name, job, num_batches=CHECKED_BATCHES, digest=True)
    return {} if report is None else {key: report[key] for key in ("pooled_sha256", "logits_sha256")}


def check_plain(_runtime: Ours, _progress: Callable[[int], None], name: str) -> Message:
    """How far the probabilities of plain torch are from the formulas of ours. Raises ValueError where that is far."""
    worker = _workers[name]
    batch = next(worker.batches())
    with torch.inference_mode():
        vectors = torch.cat([worker.dense.bottom(batch.dense)[:, None], worker.tables.lookup_all(batch)], dim=1)
        off = float((worker.dense.top(vectors)[1] - PlainDlrm(worker.tables, worker.dense)(batch)).abs().max())
    if off > TOLERANCE:
        raise ValueError(f"plain torch's probabilities are {off} from ours")
    return {"difference": off}


def serve(
    runtime: Ours,
    _progress: Callable[[int], None],
    name: str,
    job: str,
    plain: bool,
    processes: int,
    threads: int,
    batch: int,
    lag: int,
    bind: bool,
    profile: bool,
) -> Message:
    """Serve batches of `batch` samples with the model `name`, on `processes` of the ranks where each has all of it."""
    worker = _workers[name]
    if worker.ranks == 1 and runtime.rank >= processes:
        return {}
    torch.set_num_threads(threads)
    if bind and threads == 1:
        os.sched_setaffinity(0, {_CORES[runtime.rank % len(_CORES)]})
    try:
        if plain:
            return _plain(worker, batch)
        return _run(runtime, name, job, lag=lag, mini_batch_size=batch, profile=profile) or {}
    finally:
        torch.set_num_threads(1)
        os.sched_setaffinity(0, _CORES)


def _run(runtime: Ours, name: str, job: str, **changes: Any) -> Message | None:
    worker = _workers[name]
    report = worker.run(runtime.store, f"{job}/{runtime.rank if worker.ranks == 1 else 0}", **changes)
    return None if report is None else report.values


def _plain(worker: Worker, size: int) -> Message:
    batches = list(worker.batches(replace(worker.options, mini_batch_size=size)))
    model = PlainDlrm(worker.tables, worker.dense)
    with torch.inference_mode():
        model(batches[0])
        began, cpu = time.monotonic(), time.process_time()
        samples = sum(len(model(batch)) for batch in batches)
        return {"samples": samples, "seconds": time.monotonic() - began, "cpu_seconds": time.process_time() - cpu}


def open_loop(
    runtime: Ours,
    _progress: Callable[[int], None],
    name: str,
    job: str,
    quiet: str,
    silent: int,
    window: list[float],
) -> Message:
    """Percentiles of the latencies of all ranks but `silent`, in ms: of all batches, and of those that arrived in the
    window (seconds from the start)."""
    report = _workers[name].run(runtime.store, job, quiet=quiet)
    if report is None:
        return {}
    others = [one for rank, one in enumerate(report.timelines) if rank != silent]
    arrived = np.concatenate([one[:-1, timeline.ARRIVED] - one[-1, 0] for one in others]) / 1e9
    latencies = np.concatenate([one[:-1, timeline.EMITTED] - one[:-1, timeline.ARRIVED] for one in others]) / 1e6
    inside = latencies[(window[0] <= arrived) & (arrived < window[1])]
    found = {"": latencies, " while silent": inside}
    return {f"p{q}{when}": float(np.percentile(some, q)) for when, some in found.items() for q in (50, 99)}
