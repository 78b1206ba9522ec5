"""Inference as a library call: `dlrm.serve`.

model = dlrm.Model.build(shape, rank, ranks, checkpoint="model.pt")     # on every rank
for predictions in dlrm.serve(model, batches, lag=2):
    answer(predictions.first, predictions.probabilities)
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import torch

from dlrm import checkpoint as checkpoints
from dlrm import collect, delays, kernels
from dlrm.asking import AskEngine, AskRoute, own_tables, window_sizes
from dlrm.dense import DenseWork
from dlrm.engine import Engine
from dlrm.errors import OptionError
from dlrm.loop import Predictions
from dlrm.model import Dense
from dlrm.placement import Placement
from dlrm.queries import HEAD, Own, QueryEngine, batch_words
from dlrm.routes import AlltoallvRoute
from dlrm.tables import Pooling, Tables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from torch.distributed import Store

    from blsrdma import Exchange, Lookup
    from dlrm.arrivals import Arrivals
    from dlrm.data.batch import Batch
    from dlrm.kernels import Bits
    from dlrm.shape import ModelShape


log = logging.getLogger("dlrm")


@dataclass(frozen=True)
class Model:
    """One rank's part of a model."""

    rank: int
    shape: ModelShape
    placement: Placement
    tables: Tables
    replicated: Tables | None
    dense: Dense

    @classmethod
    def build(
        cls,
        shape: ModelShape,
        rank: int,
        ranks: int,
        *,
        checkpoint: str | None = None,
        seed: int = 123,
        bits: Bits = 32,
        pooling: Pooling = "sum",
        placement: Placement | None = None,
    ) -> Model:
        """Parameters from a checkpoint (see `checkpoint.read`), or drawn from `seed`; tables stored with `bits`.

        Raises CheckpointError, OptionError.
        """
        placement = placement or Placement(shape.num_tables, ranks)
        placement.check(shape.table_rows)
        state = checkpoints.read(checkpoint, shape) if checkpoint is not None else None
        kernel = kernels.choose(bits, dim=shape.dim)
        drawn = seed if state is None else None
        tables = Tables(shape, placement.pieces[rank], drawn, kernel, pooling)
        replicated = Tables(shape, placement.replicated, drawn, kernel, pooling) if placement.replicated else None
        dense = Dense(shape, seed)
        if state is not None:
            checkpoints.load(state, tables, dense)
            if replicated is not None:
                replicated.load(state)
        return cls(rank, shape, placement, tables, replicated, dense)


def serve(
    model: Model,
    batches: Iterable[Batch],
    *,
    lag: int = 0,
    input: Literal["replicated", "sharded"] = "replicated",  # noqa: A002 - as the flag
    dense_block: int = 0,
    arrivals: Arrivals | None = None,
    batch_size: int | None = None,
    query_bytes: int | None = None,
    timeout: float = 60.0,
    exchange: Literal["alltoallv", "put", "get", "auto"] = "alltoallv",
    on_peer_failure: Literal["raise", "degrade"] = "raise",
    updates: Callable[[], tuple[int, Model] | None] | None = None,
    store: Store | None = None,
    name: str = "serve",
) -> Iterator[Predictions]:
    """Yield this rank's predictions in order, each as soon as it is ready, whether or not another batch has come.

    Collective: every rank of the model calls it, with one `name` that is new to the store.

    Parameters:
        batches: the whole batches, the same on every rank (replicated; each rank predicts its slice), or this rank's
            own (sharded; ranks may have different ones, and as many as they like: one without goes on serving rows).
        lag: iterations a rank may be ahead of the slowest.
        arrivals: when batches arrive (open loop); None: the next one is there when it is asked for.
        batch_size, query_bytes: room for batches, and for messages of row numbers (sharded), which larger ones only
            slow down; None: what the ranks' first batches need, of query_bytes twice as much.
        dense_block, timeout, exchange: as --dense-block, --timeout and --exchange.
        on_peer_failure: with put, get or auto, what becomes of bags whose owner has failed: PeerFailed is raised, or
            they are zeros, and counted in the log at the end (degrade).
        updates: with put, get or auto, called before every batch: (version, model) where other tables are due, else
            None. Versions rise from 1; the model is the rank's part of one of the same shape, placement and bits, of
            which only the tables are used. Each rank goes over to it between two batches once all have been given it;
            `Predictions.version` tells. A rank whose batches have ended takes no more, and so nobody does.
        store: None: that of torchrun's environment.

    Raises BadIndex before anything of a bad batch is sent, and whatever the exchange raises.
    """
    from blsrdma import Exchange, Lookup
    from blsrdma.rendezvous import store_from_environment

    rank, placement = model.rank, model.placement
    if updates is not None and exchange == "alltoallv":
        raise OptionError("updates of tables want exchange put, get or auto")
    if updates is not None and model.replicated is not None and not all(placement.pieces):
        raise OptionError("updates of replicated tables want every rank to own some table, too")
    ranks = placement.ranks
    store = store if store is not None else store_from_environment(rank, ranks, timeout)
    source = iter(batches)
    head = next(source, None)
    source = chain([] if head is None else [head], source)
    with ExitStack() as stack:

        def opened(suffix: str, window_bytes: int, lag: int = lag) -> Exchange:
            settings: dict[str, Any] = {"lag": lag, "window_bytes": window_bytes, "timeout": timeout}
            return stack.enter_context(Exchange(store, rank, ranks, name=name + suffix, **settings))

        needs = [head.size if head is not None else 0, largest_query(head, placement)]
        sizes = collect.largest(opened("/sizes", 64, 0), needs)
        size, asked = batch_size or max(1, sizes[0]), query_bytes or 2 * sizes[1]
        # Sharded, every rank has as many samples as that; else it has its slice of them.
        window = placement.largest_message(size * (ranks if input == "sharded" else 1), model.shape.dim)
        total = size * ranks if input == "sharded" else size
        settings: dict[str, Any] = {
            "delay": delays.NoDelay(),
            "replicated": model.replicated,
            "arrivals": arrivals and arrivals.times(rank, rank if input == "sharded" else 0),
        }
        dense = DenseWork(model.dense, dense_block)
        running: Iterator[Predictions]
        if exchange != "alltoallv":
            windows = window_sizes(asked, placement, total, model.shape.dim)
            lookup = stack.enter_context(
                Lookup(
                    own_tables(model.tables, placement, rank), store, rank, ranks, name=name, lag=lag, mode=exchange,
                    pooling=model.tables.pooling, timeout=timeout, on_peer_failure=on_peer_failure,
                    updates=updates is not None, **windows,
                )
            )  # fmt: skip
            stack.callback(tell_degraded, lookup)
            engine = AskEngine(rank, placement, AskRoute(lookup, model.tables, placement), dense, **settings)
            if updates is not None:
                engine.updates = partial(due, updates)
            with torch.inference_mode():
                yield from engine.run(own(batch, placement, rank, input) for batch in source)
            return
        route = AlltoallvRoute(opened("", max(64, window)), model.tables, placement, total)
        if input == "replicated":
            running = Engine(rank, placement, route, dense, **settings).run(source)
        else:
            queries = QueryEngine(rank, placement, opened("/queries", asked), route, dense, **settings)
            running = queries.run(Own(batch, range(batch.size)) for batch in source)
        with torch.inference_mode():
            yield from running


def due(updates: Callable[[], tuple[int, Model] | None]) -> tuple[int, Tables, Tables | None] | None:
    """The tables of a version that is due, this rank's and those that all have."""
    found = updates()
    return None if found is None else (found[0], found[1].tables, found[1].replicated)


def own(batch: Batch, placement: Placement, rank: int, input: Literal["replicated", "sharded"]) -> Own:  # noqa: A002 - as serve
    """A rank's own samples of a batch that all have, or all of one of its own."""
    samples = range(batch.size) if input == "sharded" else placement.samples(batch.size)[rank]
    return Own(batch if input == "sharded" else batch.slice(samples.start, samples.stop), samples)


def tell_degraded(lookup: Lookup) -> None:
    """Say how many bags were answered with zeros."""
    count = sum(peer["asked"]["degraded"] for peer in lookup.stats()["peers"])
    if count:
        log.warning("rank %d: %d bags of failed owners were answered with zeros", lookup.rank, count)


def largest_query(batch: Batch | None, placement: Placement) -> int:
    """Bytes of the largest query for the whole of `batch`."""
    words = [sum(batch_words(batch, piece.table) for piece in own) if batch else 0 for own in placement.pieces]
    return 4 * (HEAD + max(words))
