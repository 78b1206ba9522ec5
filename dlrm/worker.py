"""What one rank does from start to end: build its part, run, bring the results together at rank 0."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.distributed import PrefixStore
from tqdm import tqdm

from dlrm import checkpoint, collect, delays, heap, kernels, metrics, outputs, planner, report
from dlrm.asking import AskEngine, AskRoute, own_tables, traffic, window_sizes
from dlrm.collective import Collective
from dlrm.data import open_source
from dlrm.data.batch import Batch, preload, recut
from dlrm.dense import DenseWork
from dlrm.engine import Engine
from dlrm.loop import Predictions
from dlrm.model import Dense
from dlrm.queries import Own, QueryEngine, largest_query
from dlrm.report import Report
from dlrm.routes import AlltoallvRoute
from dlrm.tables import Tables
from dlrm.timeline import COLUMNS, Timeline, clock
from dlrm.verify import SingleProcess, first_difference

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor
    from torch.distributed import Store

    from blsrdma import Exchange, Lookup
    from dlrm.options import Options
    from dlrm.placement import Piece
    from dlrm.planner import Plan

log = logging.getLogger("dlrm")

DATA_OPTIONS = (
    "data_generation", "data_set", "raw_data_file", "processed_data_file", "data_trace_file", "max_ind_range",
    "mini_batch_size", "num_batches", "first_sample", "num_indices_per_lookup", "num_indices_per_lookup_fixed",
    "rand_data_dist", "numpy_rand_seed",
)  # fmt: skip

LIBRARIES_BYTES = 40 << 20  # that torch and UCX take once they are in use


class Running(Protocol):
    """An engine."""

    timeline: Timeline


@dataclass(frozen=True)
class Serving:
    """A run on its way on one rank: its predictions, and afterwards the statistics of what carried vectors."""

    engine: Running
    predictions: Iterator[Predictions]
    stats: Callable[[], dict[str, Any]]


class Worker:
    """One rank's part of the model, ready to run. What can fail on bad input fails here, on all ranks alike."""

    def __init__(self, options: Options, rank: int, ranks: int) -> None:
        self.options, self.rank, self.ranks = options, rank, ranks
        torch.set_num_threads(options.threads)
        heap.keep_freed()
        self.source = open_source(options)
        self.shape = options.shape(self.source.table_rows, self.source.dense_features)
        self.kernel = kernels.choose(options.quantize_emb_with_bit, options.table_kernel, self.shape.dim)
        ready = preload(self.batches())
        self._batches: Iterator[Batch] | None = ready
        self._state: dict[str, Tensor] | None = None
        self.plan = self._planned(ready)
        self.placement = self.plan.placement
        self._build()

    def _build(self) -> None:
        """This rank's parameters, and the memory to evaluate them."""
        self.tables, self.dense = self._parameters(self.placement.pieces[self.rank])
        self._replicated = self._tables(self.placement.replicated) if self.placement.replicated else None
        self._state = None  # unmap the files
        if self.rank == 0:
            log.info("tables are stored and pooled by %s (%s)", self.kernel.name, self.options.pooling)
            log.info("MLPs are multiplied by %s", self.options.dense_kernel)
        self._work = DenseWork(self.dense, self.options.dense_block)
        self._warm_up()

    def batches(self, options: Options | None = None) -> Iterator[Batch]:
        """The batches of a run; the same ones each time it is called."""
        options = options or self.options
        wanted = options.num_batches * options.mini_batch_size + options.first_sample
        chunks = self.source.batches(
            options.mini_batch_size, -(-wanted // options.mini_batch_size) * bool(options.num_batches)
        )
        return recut(chunks, options.mini_batch_size, options.num_batches, options.first_sample)

    def run(self, store: Store | None, name: str = "dlrm", **changes: Any) -> Report | None:
        """Run all batches, and report at rank 0. Collective; `name` must be new to the store.

        `changes` replace options of this one run: lag, delay, delay_seed, num_batches, mini_batch_size, digest,
        profile, dist_backend. Raises Disagreement where ranks were started with different options; whatever the
        exchange raises passes through.
        """
        options = replace(self.options, **changes)
        sharded = options.input == "sharded"
        with ExitStack() as stack:
            exchange = self._exchanges(options, store, name, stack)
            collector = exchange("/collect", 0, collect.WINDOW_BYTES)
            collect.agree(collector, self._facts(options))
            arrivals = options.arrivals()
            settings: dict[str, Any] = {
                "delay": delays.parse(options.delay, options.delay_seed),
                "keep_pooled": options.digest,
                "timeline": Timeline(profile=options.profile),
                "arrivals": arrivals and arrivals.times(self.rank, self.rank if sharded else 0),
            }
            same = all(getattr(options, name) == getattr(self.options, name) for name in DATA_OPTIONS)
            batches = self._batches if same and self._batches else preload(self.batches(options))
            self._batches = None
            serving = self._serving(options, store, name, stack, exchange, settings, batches)
            collect.barrier(collector)
            began = time.process_time()
            results = list(self._watched(serving.predictions))
            cpu_seconds = time.process_time() - began
            timeline = serving.engine.timeline
            spent = {"phases_ms": timeline.phases(), "phases_cpu_ms": timeline.processor()}
            stats = serving.stats() | {key: _milliseconds(of) for key, of in spent.items()}
            stats["cpu_seconds"], stats["resident_bytes"] = cpu_seconds, resident_bytes()
            stats["table_bytes"] = self.table_bytes()
            return self._report(options, collector, timeline, stats, results)

    def _serving(
        self,
        options: Options,
        store: Store | None,
        name: str,
        stack: ExitStack,
        exchange: Callable[[str, int, int], Exchange | Collective],
        settings: dict[str, Any],
        batches: Iterator[Batch],
    ) -> Serving:
        """What serves a run. Collective; what it opens is closed by `stack`."""
        needed = self.placement.largest_message(options.mini_batch_size, self.shape.dim)
        settings["replicated"] = self._replicated
        engine: Engine | QueryEngine | AskEngine
        if options.exchange != "alltoallv":
            lookup = stack.enter_context(self._lookup(store, name, options))
            asked = AskRoute(lookup, self.tables, self.placement)
            engine = AskEngine(self.rank, self.placement, asked, self._work, **settings)
            return Serving(engine, engine.run(self._own(batches)), lambda: traffic(lookup))
        rows = exchange("", options.lag, options.window_bytes or max(needed, 64))
        route = AlltoallvRoute(rows, self.tables, self.placement, options.mini_batch_size)
        if options.input == "sharded":
            asking: Any = exchange("/queries", options.lag, options.window_bytes or self._query_bytes)
            engine = QueryEngine(self.rank, self.placement, asking, route, self._work, **settings)
            return Serving(engine, engine.run(self._own(batches)), rows.stats)
        engine = Engine(self.rank, self.placement, route, self._work, **settings)
        return Serving(engine, engine.run(batches), rows.stats)

    def table_bytes(self) -> int:
        """Bytes of this rank's tables as stored."""
        return self.tables.nbytes() + (self._replicated.nbytes() if self._replicated else 0)

    def _exchanges(
        self, options: Options, store: Store | None, name: str, stack: ExitStack
    ) -> Callable[[str, int, int], Exchange | Collective]:
        """What makes the exchanges of a run, given the end of a name, a lag and the size of windows."""
        if options.dist_backend != "bls":
            from dlrm import transports

            own = store and PrefixStore(name, store)
            make = stack.enter_context(
                transports.opened(options.dist_backend, own, self.rank, self.ranks, options.timeout)
            )
            return lambda _, lag, window_bytes: Collective(make(lag, window_bytes), lag, options.timeout)
        from blsrdma import Exchange

        def exchange(suffix: str, lag: int, window_bytes: int) -> Exchange:
            settings: dict[str, Any] = {"lag": lag, "window_bytes": window_bytes, "timeout": options.timeout}
            return stack.enter_context(Exchange(store, self.rank, self.ranks, name=name + suffix, **settings))

        return exchange

    def _lookup(self, store: Store | None, name: str, options: Options) -> Lookup:
        """This rank's part in the lookups of a run."""
        from blsrdma import Lookup

        sizes = window_sizes(self._query_bytes, self.placement, options.mini_batch_size, self.shape.dim)
        if options.window_bytes:
            sizes = {size: max(options.window_bytes, 4 * self.shape.dim, 128) for size in sizes}
        return Lookup(
            own_tables(self.tables, self.placement, self.rank), store, self.rank, self.ranks, name=name + "/lookup",
            lag=options.lag, mode=options.exchange, pooling=options.pooling, timeout=options.timeout, **sizes,
        )  # fmt: skip

    def _planned(self, ready: Iterator[Batch]) -> Plan:
        """The plan; looks into the data only where it has to, and puts back what it took."""
        options = self.options
        taken: list[Batch] = []
        if options.placement != "contiguous" or options.plan:
            for batch in ready:
                taken.append(batch)
                if sum(one.size for one in taken) >= planner.SAMPLE_LOOKUPS:
                    break
            self._batches = chain(taken, ready)
        rows = self.shape.table_rows
        cost = planner.costs(rows, self.shape.dim, self.kernel, taken)
        placement = planner.place(
            options.placement, rows, self.ranks, cost, options.row_wise_above, options.replicate_below
        )
        plan = planner.plan(placement, rows, cost, options.mini_batch_size)
        message = placement.largest_message(options.mini_batch_size, self.shape.dim)
        windows = message * self.ranks * (options.lag + 1) * 2
        others = windows + resident_bytes() + LIBRARIES_BYTES  # what is there already, and what will be
        self.planned_bytes = [tables + others for tables in plan.bytes]
        if options.plan and self.rank == 0:
            report.show_plan(plan, self.planned_bytes)
        return plan

    def _facts(self, options: Options) -> dict[str, str]:
        """What all ranks must have alike."""
        return {
            "model": hashlib.sha256(
                repr((self.shape, options.load_model, options.numpy_rand_seed)).encode()
            ).hexdigest(),
            "kernel": f"{self.kernel.name}, {options.pooling}",
            "dense-kernel": options.dense_kernel,
            "placement": json.dumps(self.placement.as_json()),
            "data": repr([getattr(options, name) for name in DATA_OPTIONS]),
            "lag": str(options.lag),
            "input": options.input,
            "dist-backend": options.dist_backend,
            "exchange": options.exchange,
            "device": options.device,
        }

    @cached_property
    def _query_bytes(self) -> int:
        """Room for a query: just enough where all data are small, else twice what the first batches need."""
        head = list(islice(self.batches(), 16))
        least = largest_query(head, self.placement)
        return least if self.options.num_batches in range(1, 17) else 2 * least + 4096

    def _own(self, batches: Iterator[Batch]) -> Iterator[Own]:
        """This rank's samples of every batch."""
        for batch in batches:
            samples = self.placement.samples(batch.size)[self.rank]
            yield Own(batch.slice(samples.start, samples.stop), samples)

    def _tables(self, owned: Sequence[int | Piece]) -> Tables:
        options = self.options
        seed = None if self._state is not None else options.numpy_rand_seed
        tables = Tables(self.shape, owned, seed, self.kernel, options.pooling)
        if self._state is not None:
            tables.load(self._state)
        return tables

    def _parameters(self, owned: Sequence[int | Piece]) -> tuple[Tables, Dense]:
        options = self.options
        self._state = checkpoint.read(options.load_model, self.shape) if options.load_model else None
        tables = self._tables(owned)
        dense = Dense(self.shape, options.numpy_rand_seed)
        dense.loss_threshold, dense.kernel = options.loss_threshold, options.dense_kernel
        if self._state is not None:
            checkpoint.load_dense(self._state, dense)
        return tables, dense

    @cached_property
    def _single_process(self) -> SingleProcess:
        divided = [piece for pieces in self.placement.pieces for piece in pieces if piece.rows is not None]
        tables, dense = self._parameters([t for t in range(self.shape.num_tables) if t not in self.placement.divided])
        parts = [self._tables([piece]) for piece in divided]
        self._state = None
        return SingleProcess(tables, dense, self.placement, self.options.dense_block, parts)

    def _warm_up(self) -> None:
        """Evaluate the dense model once, so that the first iteration does not pay for torch's own start."""
        size = self.options.mini_batch_size
        samples = self.placement.samples(size)[self.rank]
        piece = self._work.slice(samples)
        with torch.inference_mode():
            piece.bottom(torch.zeros(size, self.shape.bottom[0]))
            piece.predict([torch.zeros(len(samples), self.shape.num_tables, self.shape.dim)])

    def _watched(self, results: Iterator[Predictions]) -> Iterator[Predictions]:
        """Pass results on; at rank 0 with a progress bar on a terminal and a line of log every --print-freq batches."""
        if self.rank != 0:
            yield from results
            return
        total = self.options.num_batches or None
        every = max(0, self.options.print_freq)
        since = clock()
        with tqdm(total=total, unit="batch", disable=not sys.stderr.isatty(), leave=False) as bar:
            for done, result in enumerate(results, 1):
                yield result
                bar.update()
                if every and done % every == 0:
                    now = clock()
                    pace = f", {(now - since) / 1e6 / every:.2f} ms/it" if self.options.print_time else ""
                    log.info("batch %d: predictions up to sample %d%s", done, result.first + len(result.logits), pace)
                    since = now

    def _report(
        self,
        options: Options,
        collector: Exchange | Collective,
        timeline: Timeline,
        stats: dict[str, Any],
        results: list[Predictions],
    ) -> Report | None:
        """Bring everything to rank 0 and sum it up there; None elsewhere. Collective."""
        labelled = bool(results) and all(result.labels is not None for result in results)
        columns = [[result.logits for result in results], [result.probabilities for result in results]]
        columns.append([result.labels for result in results if result.labels is not None] if labelled else columns[0])
        mine = np.stack([torch.cat(column).numpy() if column else np.empty(0, np.float32) for column in columns])
        gathered = collect.gather(collector, mine)
        cuts = collect.gather(collector, np.array([(r.first, len(r.logits)) for r in results], np.int64))
        timelines = collect.gather(collector, timeline.array())
        all_stats = collect.gather_json(collector, stats | {"labelled": labelled})
        if gathered is None or cuts is None or timelines is None or all_stats is None:
            if options.digest:
                for result in results:
                    collect.gather(collector, outputs.kept_pooled(result))
            return None

        by_sample = outputs.in_sample_order(gathered, cuts)
        logits, probabilities, known = by_sample
        timeline_arrays = [one.reshape(-1, COLUMNS) for one in timelines]
        values = report.assemble(options, timeline_arrays, all_stats)
        digest, difference = hashlib.sha256(f"{self.kernel.name} {options.pooling}".encode()), None
        if options.digest:
            for batch, result in zip(islice(self.batches(options), len(results)), results, strict=True):
                parts = collect.gather(collector, outputs.kept_pooled(result))
                assert parts is not None
                pooled = np.concatenate(parts).reshape(batch.size, self.shape.num_tables, self.shape.dim)
                digest.update(pooled.tobytes())
                if options.verify and difference is None:
                    predicted = by_sample[:2, batch.first : batch.first + batch.size]
                    difference = self._difference(batch, pooled, predicted)
        has_labels = all(one["labelled"] for one in all_stats if one["iterations"]) and len(known) > 0
        values |= {
            "samples": len(probabilities),
            "samples_per_s": len(probabilities) / values["seconds"],
            "kernel": self.kernel.name,
            "dense_kernel": options.dense_kernel,
            "pooled_sha256": digest.hexdigest() if options.digest else None,
            "logits_sha256": hashlib.sha256(logits.tobytes()).hexdigest() if options.digest else None,
            "exact": difference is None if options.verify else None,
            "plan": report.plan_values(self.plan, self.planned_bytes),
            **self._more_values(all_stats),
        }
        for name, metric in (
            ("auc", metrics.auc),
            ("accuracy", metrics.accuracy),
            ("logloss", metrics.logloss),
            ("normalised_entropy", metrics.normalised_entropy),
        ):
            values[name] = metric(known, probabilities) if has_labels else None
        if options.predictions:
            outputs.save_predictions(options.predictions, probabilities)
        return Report(values, timeline_arrays, difference)

    def _more_values(self, stats: list[dict[str, Any]]) -> dict[str, Any]:  # noqa: ARG002 - every rank's
        """What else is reported."""
        return {}

    def _difference(self, batch: Batch, pooled: NDArray[np.float32], outputs: NDArray[np.float32]) -> str | None:
        """The first bit of a batch that is not what a single process computes, in words."""
        wanted = [part.numpy() for part in self._single_process.evaluate(batch)]
        pairs = zip(("pooled vectors", "logits", "probabilities"), (pooled, *outputs), wanted, strict=True)
        found = (first_difference(what, got, want, batch.first) for what, got, want in pairs)
        difference = next((text for text in found if text), None)
        return difference and f"batch {batch.first // self.options.mini_batch_size}: {difference}"


def _milliseconds(phases: dict[str, int] | None) -> dict[str, float] | None:
    return None if phases is None else {name: nanoseconds / 1e6 for name, nanoseconds in phases.items()}


def resident_bytes() -> int:
    """Memory of this process that is not shared with files: what the kernel calls RssAnon plus RssShmem."""
    words = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(words[name].split()[0]) for name in ("RssAnon", "RssShmem")) << 10
