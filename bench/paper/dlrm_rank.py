"""The ranks' side of `bench.paper.dlrm`: what `bench.rank` runs there, with the models of `bench.inference_rank`.

Every rank replies with the seconds of processor time that it took, `cpu`; rank 0 with all else.
"""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Any

import torch

from bench.control import Message
from bench.inference_rank import worker
from dlrm import timeline

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.systems.base import Runtime


def serve(
    runtime: Runtime, _progress: Callable[[int], None], name: str, job: str, changes: dict[str, Any]
) -> Message:
    """Run the model `name` once, with options changed: nanoseconds slept, and from arrival to prediction, by rank and
    iteration, and when batches arrived at rank 0, from the start on."""
    began = _cpu()
    report = worker(name).run(getattr(runtime, "store", None), job, **changes)
    if report is None:
        return {"cpu": _cpu() - began}
    values, runs = report.values, [one[:-1] for one in report.timelines]
    arrived = runs[0][:, timeline.ARRIVED] - report.timelines[0][-1, 0]
    wanted = ("samples", "auc", "pooled_sha256", "logits_sha256", "phases_ms", "bytes_by_path")
    return {
        "cpu": _cpu() - began,
        "ms": values["ms_per_iteration"],
        "latency": [(one[:, timeline.EMITTED] - one[:, timeline.ARRIVED]).tolist() for one in runs],
        "arrived": arrived.tolist(),
        "slept": [one[:, timeline.SLEPT].tolist() for one in runs],
        **{key: values[key] for key in wanted},
    }


def alone(runtime: Runtime, _progress: Callable[[int], None], name: str, job: str, threads: int) -> Message:
    """Rank 0 serves all batches by itself."""
    if runtime.rank:
        return {"cpu": 0.0}
    began = _cpu()
    torch.set_num_threads(threads)
    try:
        report = worker(name).run(getattr(runtime, "store", None), job)
    finally:
        torch.set_num_threads(1)
    assert report is not None
    return {"cpu": _cpu() - began, "ms": report.values["ms_per_iteration"], "samples": report.values["samples"]}


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
