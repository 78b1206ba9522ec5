"""What one rank does whose tables are on a GPU, where that differs from dlrm.worker: memory, engine, verification."""

from __future__ import annotations

import ctypes
import os
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from blsrdma import GpuExchange
from blsrdma.gpu import device as devices
from blsrdma.settings import Settings, default_memory_limit
from dlrm.data.batch import preload
from dlrm.errors import OptionError
from dlrm.gpu import memory
from dlrm.gpu.accelerator import open_accelerator
from dlrm.gpu.bounds import Reference, first_outside
from dlrm.gpu.dense import BLOCK_ALIGN, GpuDense, Span, planned_bytes
from dlrm.gpu.engine import GpuEngine, slots_needed
from dlrm.gpu.interaction import GpuInteraction
from dlrm.gpu.slots import Slot
from dlrm.gpu.staging import GROWTH, Stager, Wanted
from dlrm.gpu.tables import GpuTables
from dlrm.placement import Piece
from dlrm.verify import first_difference
from dlrm.worker import Serving, Worker, log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import ExitStack

    from numpy.typing import NDArray
    from torch.distributed import Store

    from blsrdma import Exchange
    from dlrm.collective import Collective
    from dlrm.data.batch import Batch
    from dlrm.gpu.accelerator import Accelerator
    from dlrm.gpu.tiers import Tier
    from dlrm.options import Options

HEAD_SAMPLES = 4096  # of the data that show which rows are asked for most, and how large batches are


class GpuWorker(Worker):
    """One rank's part of the model on its GPU: number LOCAL_RANK modulo the GPUs of the host."""

    def __init__(self, options: Options, rank: int, ranks: int, accelerator: Accelerator | None = None) -> None:
        self._local = int(os.environ.get("LOCAL_RANK", rank))
        self._sharing_all = int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        self._accelerator = accelerator or open_accelerator(self._local, options.tf32)
        self._largest_share = 0.0  # of its bound that the error of a logit was
        super().__init__(options, rank, ranks)

    @property
    def _device(self) -> Any:
        return self._accelerator.device

    def _build(self) -> None:
        options, placement, shape = self.options, self.placement, self.shape
        if options.dense_block % BLOCK_ALIGN:
            raise OptionError(f"--dense-block {options.dense_block}: wanted a multiple of {BLOCK_ALIGN} on a GPU")
        needed = placement.largest_message(options.mini_batch_size, shape.dim)
        if options.window_bytes is not None and options.window_bytes < needed:
            raise OptionError(
                f"--window-bytes {options.window_bytes}: messages in GPU memory come whole, and have up to {needed}"
            )
        mean = options.pooling == "mean"
        own = placement.pieces[self.rank]
        self._wanted = Wanted(
            tuple(piece.table for piece in own), placement.replicated, placement.divided if mean else ()
        )
        _, self.dense = self._parameters(())
        pieces = [*own, *map(Piece, placement.replicated)]
        head = self._head()
        plan = self._memory_plan(pieces, head)
        kinds = (self.shape, self.kernel, options.pooling)

        def put(pieces: Sequence[Piece], tiers: Sequence[Tier]) -> GpuTables:
            return GpuTables(
                self._device, kinds[0], pieces, kinds[1], kinds[2], tiers, lambda one: self._tables((one,))
            )

        self._on_gpu = put(own, plan.tiers[: len(own)])
        self._copies = put(pieces[len(own) :], plan.tiers[len(own) :]) if placement.replicated else None
        self._state = None  # unmap the files
        self._interaction = GpuInteraction(self._device, shape, placement)
        self._dense_on_gpu: tuple[int, GpuDense] | None = None
        self._lanes = self._accelerator.lane(), self._accelerator.lane()
        self._warm(options)
        self._compile(any(batch.weights is not None for batch in head))

    def _compile(self, weighted: bool) -> None:
        """Launch every kernel once, so that the first batch does not wait for a compiler."""
        device, widths = self._device, [*map(len, self.placement.pieces), len(self.placement.replicated)]
        size = 4 * max(self.shape.dim * (1 + max(widths)), self._interaction.width, 64)
        scratch = [device.memory(max(size, 32 * max(widths))) for _ in range(2)]
        for memory_ in scratch:
            device.fill(memory_.address, 0, memory_.size)
        inputs, out = (memory_.address for memory_ in scratch)
        for tables in (self._on_gpu, self._copies):
            if tables is not None:
                tables.compile(inputs, out, weighted)
        parts = [inputs] * (self.ranks + bool(self.placement.replicated))
        self._interaction.launch(1, inputs, parts, 0, out, 0)
        self._accelerator.settle()
        for memory_ in scratch:
            memory_.close()

    def _memory_plan(self, pieces: Sequence[Piece], head: Sequence[Batch]) -> memory.Plan:
        """Where the rows of `pieces` go; tells it."""
        options, device = self.options, self._device
        self._upload_bytes = self._largest_upload(head)
        message = self.placement.largest_message(options.mini_batch_size, self.shape.dim)
        needs = memory.Needs(
            memory.window_bytes(options.window_bytes or message, self.ranks, options.lag),
            slots_needed(options.lag) * self._slot_bytes(options),
            planned_bytes(self.dense, self._span(options)),
        )
        sharing = len(range(self._local % devices.count(), self._sharing_all, devices.count()))
        most = memory.limit(options.gpu_memory, device.total_bytes, device.free_bytes, max(1, sharing))
        host_most = Settings.resolve().memory_limit or default_memory_limit(self._sharing_all)
        rows = [self.shape.table_rows[piece.table] if piece.rows is None else len(piece.rows) for piece in pieces]
        asked = [_asked(head, piece) for piece in pieces]
        plan = memory.plan(most, host_most, needs, rows, self.kernel.row_bytes(self.shape.dim), asked)
        log.info("GPU %d (%s): %s", device.ordinal, device.name, plan)
        return plan

    def _head(self) -> list[Batch]:
        """The first batches, which are put back."""
        assert self._batches is not None
        head: list[Batch] = []
        for batch in self._batches:
            head.append(batch)
            if sum(one.size for one in head) >= HEAD_SAMPLES:
                break
        self._batches = chain(head, self._batches)
        return head

    def _largest_upload(self, head: Sequence[Batch]) -> int:
        own = (self._wanted.upload_bytes(one, self.placement.samples(one.size)[self.rank]) for one in head)
        return int(max(own, default=0) * GROWTH)

    def _span(self, options: Options) -> Span:
        return Span(options.dense_block, len(self.placement.samples(options.mini_batch_size)[self.rank]))

    def _slot_bytes(self, options: Options) -> int:
        samples = len(self.placement.samples(options.mini_batch_size)[self.rank])
        return self._upload_bytes + samples * (1 + len(self.placement.replicated)) * self.shape.dim * 4

    def _warm(self, options: Options) -> GpuDense:
        """The dense model with memory for batches of a run; made once for each size."""
        span = self._span(options)
        if self._dense_on_gpu is None or self._dense_on_gpu[0] != span.rows:
            made = GpuDense(self._accelerator, self.dense, span, self._interaction, options.cuda_graphs)
            self._dense_on_gpu = span.rows, made
        return self._dense_on_gpu[1]

    def _serving(
        self,
        options: Options,
        store: Store | None,
        name: str,
        stack: ExitStack,
        exchange: Callable[[str, int, int], Exchange | Collective],  # noqa: ARG002 - of host memory
        settings: dict[str, Any],
        batches: Iterator[Batch],
    ) -> Serving:
        dim, pieces = self.shape.dim, self.placement.pieces
        message = self.placement.largest_message(options.mini_batch_size, dim)
        rows = stack.enter_context(
            GpuExchange(
                store, self.rank, self.ranks, device=self._device.ordinal, name=name, lag=options.lag,
                window_bytes=options.window_bytes or max(message, 64), timeout=options.timeout,
            )
        )  # fmt: skip
        samples = len(self.placement.samples(options.mini_batch_size)[self.rank])
        copies = len(self.placement.replicated)
        kept = sum(map(len, pieces)) + copies if options.digest else 0

        def new_slot() -> Slot:
            return Slot(self._device, self._upload_bytes, samples, 4 * dim, copies, kept, options.profile)

        stager = Stager(self._device, self.rank, self.placement, self.shape.table_rows, self._wanted, options.digest)
        engine = GpuEngine(
            self.rank, self.placement, rows, self._on_gpu, self._copies, self._warm(options), stager, self._wanted,
            new_slot, self._lanes, timeout=options.timeout, **settings,
        )  # fmt: skip
        stack.enter_context(_given_back(engine))

        def stats() -> dict[str, Any]:
            found, tables = rows.stats(), [one for one in (self._on_gpu, self._copies) if one is not None]
            gpu: dict[str, Any] = {"name": self._device.name, "ordinal": self._device.ordinal}
            gpu["table_bytes"] = sum(one.gpu_bytes for one in tables)
            gpu["host_bytes"] = sum(one.host_bytes for one in tables)
            gpu["rows"], gpu["hot_rows"] = sum(one.rows for one in tables), sum(one.hot_rows for one in tables)
            gpu["batch_bytes"], gpu["window_bytes"] = engine.device_bytes, found["device_bytes"]
            gpu["steps_ms"] = engine.device_ms if options.profile else None
            return found | {"gpu": gpu}

        return Serving(engine, engine.serve(preload(map(stager.stage, batches))), stats)

    def table_bytes(self) -> int:
        """Bytes of this rank's tables as stored."""
        return self._on_gpu.nbytes() + (self._copies.nbytes() if self._copies else 0)

    def _facts(self, options: Options) -> dict[str, str]:
        return super()._facts(options) | {"tf32": str(options.tf32)}

    def _difference(self, batch: Batch, pooled: NDArray[np.float32], outputs: NDArray[np.float32]) -> str | None:
        """The first bit of pooled vectors that is not the CPU kernel's, or the first logit outside its bound."""
        reference = Reference(self._single_process.dense, self.options.tf32)
        with torch.inference_mode():
            wanted = self._single_process.lookup(batch)
            found = first_difference("pooled vectors", pooled, wanted.numpy(), batch.first)
            logits, bounds = reference.logits(batch.dense, wanted)
            probabilities = reference.probabilities(logits, bounds)
        pairs = zip(("logits", "probabilities"), outputs, ((logits, bounds), probabilities), strict=True)
        for what, got, (value, bound) in pairs:
            outside, share = first_outside(what, got, value, bound, batch.first)
            found = found or outside
            self._largest_share = max(self._largest_share, share)
        return found and f"batch {batch.first // self.options.mini_batch_size}: {found}"

    def _more_values(self, stats: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "gpu": [one["gpu"] for one in stats],
            "largest_error_in_bounds": self._largest_share if self.options.verify else None,
        }


@contextmanager
def _given_back(engine: GpuEngine) -> Iterator[None]:
    """Close the engine. After an error a device may still use what it has, and where it hangs, giving it back would
    wait for ever: it is kept, with the tables, until the process ends."""
    try:
        yield
    except BaseException:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))
        raise
    engine.close()


def _asked(head: Sequence[Batch], piece: Piece) -> NDArray[np.int64]:
    """The rows that batches ask of a piece, counted from its first."""
    some = [batch.indices[piece.table].numpy() for batch in head]
    rows = np.concatenate(some) if some else np.empty(0, np.int64)
    if piece.rows is None:
        return rows
    return rows[(rows >= piece.rows.start) & (rows < piece.rows.stop)] - piece.rows.start
