"""What one rank does from start to end: build its part, run, bring the results together at rank 0."""

from __future__ import annotations

import hashlib
import logging
import sys
from dataclasses import replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from dlrm import checkpoint, collect, delays, metrics, report
from dlrm.data import open_source
from dlrm.data.batch import Batch, preload
from dlrm.dense import DenseSlice
from dlrm.engine import Engine, Predictions
from dlrm.model import Dense
from dlrm.placement import Placement
from dlrm.report import Report
from dlrm.routes import AlltoallvRoute
from dlrm.tables import Tables
from dlrm.verify import SingleProcess, first_difference

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray
    from torch.distributed import Store

    from blsrdma import Exchange
    from dlrm.options import Options

log = logging.getLogger("dlrm")


class Worker:
    """One rank's part of the model, ready to run. What can fail on bad input fails here, on all ranks alike."""

    def __init__(self, options: Options, rank: int, ranks: int) -> None:
        self.options, self.rank, self.ranks = options, rank, ranks
        torch.set_num_threads(options.threads)
        self.source = open_source(options)
        self.shape = options.shape(self.source.table_rows)
        self.placement = Placement(self.shape.num_tables, ranks)
        self._state = checkpoint.read(options.load_model, self.shape) if options.load_model else None
        self.tables, self.dense = self._parameters(self.placement.tables[rank])
        self._batches: Iterator[Batch] | None = preload(self.batches())
        self._warm_up()

    def batches(self) -> Iterator[Batch]:
        """The batches of the run; the same ones each time it is called."""
        return self.source.batches(self.options.mini_batch_size, self.options.num_batches)

    def run(self, store: Store, name: str = "dlrm", **changes: Any) -> Report | None:
        """Run all batches, and report at rank 0. Collective; `name` must be new to the store.

        `changes` replace options of this one run: lag, delay, delay_seed. Whatever the exchange raises passes through.
        """
        from blsrdma import Exchange

        options = replace(self.options, **changes)
        needed = self.placement.largest_message(options.mini_batch_size, self.shape.dim)
        common: dict[str, Any] = {"timeout": options.timeout}
        with (
            Exchange(
                store, self.rank, self.ranks, name=f"{name}/collect", window_bytes=collect.WINDOW_BYTES, **common
            ) as collector,
            Exchange(
                store,
                self.rank,
                self.ranks,
                name=name,
                lag=options.lag,
                window_bytes=options.window_bytes or max(needed, 64),
                **common,
            ) as exchange,
        ):
            engine = Engine(
                self.rank,
                self.placement,
                AlltoallvRoute(exchange, self.tables, self.placement, options.mini_batch_size),
                self.dense,
                block=options.dense_block,
                delay=delays.parse(options.delay, options.delay_seed),
                keep_pooled=options.digest,
            )
            batches = self._batches or preload(self.batches())
            self._batches = None
            collect.barrier(collector)
            results = list(self._watched(engine.run(batches)))
            return self._report(options, collector, engine, exchange.stats(), results)

    def _parameters(self, owned: range) -> tuple[Tables, Dense]:
        tables = Tables(self.shape, owned, self.options.numpy_rand_seed)
        dense = Dense(self.shape, self.options.numpy_rand_seed)
        if self._state is not None:
            checkpoint.load(self._state, tables, dense)
        return tables, dense

    @cached_property
    def _single_process(self) -> SingleProcess:
        tables, dense = self._parameters(range(self.shape.num_tables))
        return SingleProcess(tables, dense, self.placement, self.options.dense_block)

    def _warm_up(self) -> None:
        """Evaluate the dense model once, so that the first iteration does not pay for torch's own start."""
        size = self.options.mini_batch_size
        piece = DenseSlice(self.dense, self.placement.samples(size)[self.rank], self.options.dense_block)
        with torch.inference_mode():
            piece.bottom(torch.zeros(size, self.source.dense_features))
            piece.fill([torch.zeros(size, self.shape.num_tables, self.shape.dim)])
            piece.predict()

    def _watched(self, results: Iterator[Predictions]) -> Iterator[Predictions]:
        """Pass results on; at rank 0 with a progress bar on a terminal and a line of log every --print-freq batches."""
        if self.rank != 0:
            yield from results
            return
        total = self.options.num_batches or None
        every = self.options.print_freq
        with tqdm(total=total, unit="batch", disable=not sys.stderr.isatty(), leave=False) as bar:
            for done, result in enumerate(results, 1):
                yield result
                bar.update()
                if every and done % every == 0:
                    log.info("batch %d: predictions up to sample %d", done, result.first + len(result.logits))

    def _report(
        self,
        options: Options,
        collector: Exchange,
        engine: Engine,
        stats: dict[str, Any],
        results: list[Predictions],
    ) -> Report | None:
        """Bring everything to rank 0 and sum it up there; None elsewhere. Collective."""
        flat = [torch.stack([result.logits, result.probabilities]) for result in results]
        mine = torch.cat(flat, dim=1).numpy() if flat else np.empty((2, 0), np.float32)
        gathered = collect.gather(collector, mine)
        timelines = collect.gather(collector, engine.timeline.array())
        all_stats = collect.gather_json(collector, stats)
        if gathered is None or timelines is None or all_stats is None:
            if options.digest:
                for result in results:
                    collect.gather(collector, _pooled(result))
            return None

        by_rank = [part.reshape(2, -1) for part in gathered]
        merger = _Merger(self.placement)
        digest, difference = hashlib.sha256(), None
        logits, probabilities, labels = [], [], []
        for batch, result in zip(islice(self.batches(), len(results)), results, strict=True):
            outputs = merger.in_sample_order(by_rank, batch.size)
            logits.append(outputs[0])
            probabilities.append(outputs[1])
            if batch.labels is not None:
                labels.append(batch.labels.numpy())
            if not options.digest:
                continue
            parts = collect.gather(collector, _pooled(result))
            assert parts is not None
            pooled = np.concatenate(parts).reshape(batch.size, self.shape.num_tables, self.shape.dim)
            digest.update(pooled.tobytes())
            if options.verify and difference is None:
                difference = self._difference(batch, pooled, outputs)
        everything = np.concatenate(probabilities)
        known = np.concatenate(labels) if labels else None
        values = report.assemble(options, [one.reshape(-1, 6) for one in timelines], all_stats)
        values |= {
            "samples": len(everything),
            "samples_per_s": len(everything) / values["seconds"],
            "pooled_sha256": digest.hexdigest() if options.digest else None,
            "logits_sha256": hashlib.sha256(np.concatenate(logits).tobytes()).hexdigest() if options.digest else None,
            "exact": difference is None if options.verify else None,
            "auc": None if known is None else metrics.auc(known, everything),
            "accuracy": None if known is None else metrics.accuracy(known, everything),
        }
        if options.predictions:
            save_predictions(options.predictions, everything)
        return Report(values, [one.reshape(-1, 6) for one in timelines], difference)

    def _difference(self, batch: Batch, pooled: NDArray[np.float32], outputs: NDArray[np.float32]) -> str | None:
        """The first bit of a batch that is not what a single process computes, in words."""
        wanted = [part.numpy() for part in self._single_process.evaluate(batch)]
        pairs = zip(("pooled vectors", "logits", "probabilities"), (pooled, *outputs), wanted, strict=True)
        found = (first_difference(what, got, want, batch.first) for what, got, want in pairs)
        difference = next((text for text in found if text), None)
        return difference and f"batch {batch.first // self.options.mini_batch_size}: {difference}"


class _Merger:
    """Puts what the ranks predicted, each its slices one after another, into sample order, batch by batch."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._used = [0] * placement.ranks

    def in_sample_order(self, by_rank: list[NDArray[np.float32]], batch_size: int) -> NDArray[np.float32]:
        """The next batch, [2, B], of arrays [2, n of the rank]."""
        parts = []
        for rank, samples in enumerate(self._placement.samples(batch_size)):
            start = self._used[rank]
            self._used[rank] = start + len(samples)
            parts.append(by_rank[rank][:, start : self._used[rank]])
        return np.concatenate(parts, axis=1)


def _pooled(result: Predictions) -> NDArray[np.float32]:
    assert result.pooled is not None
    return result.pooled.numpy()


def save_predictions(path: str, probabilities: NDArray[np.float32]) -> None:
    """Write click probabilities in sample order: .npy float32 [samples], or .csv with columns sample, probability."""
    if path.endswith(".npy"):
        np.save(path, probabilities)
        return
    with Path(path).open("w", encoding="ascii") as stream:
        stream.write("sample,probability\n")
        stream.writelines(f"{sample},{value:.9g}\n" for sample, value in enumerate(probabilities.tolist()))
