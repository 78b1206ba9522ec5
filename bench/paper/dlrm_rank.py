"""The ranks' side of `bench.paper.dlrm`: what `bench.rank` runs there, with the models of `bench.inference_rank`.

Every rank replies with the seconds of processor time that it took, `cpu`; rank 0 with all else.
"""

from __future__ import annotations

import resource
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from bench import inference_rank
from bench.control import Message
from bench.inference_rank import worker
from dlrm import timeline
from dlrm.worker import DATA_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.systems.base import Runtime
    from dlrm.data import Source
    from dlrm.data.batch import Batch
    from dlrm.options import Options


class Kept:
    """A source whose batches are read once, and then are in memory for all runs, and all models of the same data."""

    _known: ClassVar[dict[str, list[Batch]]] = {}

    def __init__(self, source: Source, options: Options) -> None:
        self._source = source
        self.dense_features, self.table_rows = source.dense_features, source.table_rows
        data = [getattr(options, name) for name in DATA_OPTIONS if name != "num_batches"]
        self._data = repr([self.dense_features, self.table_rows, *data])

    def batches(self, batch_size: int, num_batches: int) -> Iterator[Batch]:
        """See `dlrm.data.Source.batches`."""
        key = f"{self._data} {batch_size}"
        known = self._known.get(key, [])
        if len(known) < num_batches or not num_batches:
            known = self._known[key] = list(self._source.batches(batch_size, num_batches))
        return islice(known, num_batches or None)


def load(runtime: Runtime, progress: Callable[[int], None], name: str, flags: list[str], alone: bool) -> Message:
    """See `bench.inference_rank.load`; alone: rank 0 only."""
    if alone and runtime.rank:
        return {}
    message = inference_rank.load(runtime, progress, name, flags, alone)
    made = worker(name)
    made.source = Kept(made.source, made.options)
    return message


def serve(runtime: Runtime, _progress: Callable[[int], None], name: str, job: str, changes: dict[str, Any]) -> Message:
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


def alone(
    runtime: Runtime, _progress: Callable[[int], None], name: str, job: str, threads: int, digest: bool
) -> Message:
    """Rank 0 serves all batches by itself."""
    if runtime.rank:
        return {"cpu": 0.0}
    began = _cpu()
    torch.set_num_threads(threads)
    try:
        report = worker(name).run(getattr(runtime, "store", None), job, digest=digest)
    finally:
        torch.set_num_threads(1)
    assert report is not None
    wanted = ("samples", "auc", "pooled_sha256", "logits_sha256")
    return {
        "cpu": _cpu() - began,
        "ms": report.values["ms_per_iteration"],
        **{key: report.values[key] for key in wanted},
    }


def _cpu() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
