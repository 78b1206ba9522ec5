"""The dense work of one rank for one batch: its slice of the samples, in blocks.

How a matrix product, and a sigmoid, rounds depends on the shape it is given, on the row a sample sits in (the last
rows and elements take other code paths) and on alignment. With a block size B the batch is cut into blocks of B
rows that start at multiples of B in the *batch*, and a sample always sits in the same row of its block, whichever
rank evaluates it; rows of other ranks are padding, and hold whatever was there before. Every tensor that enters a
matrix product is allocated for it, so it is 64-byte aligned. Then the bits depend neither on the number of ranks nor
on who owns which sample. Without a block size the slice is cut evenly into blocks that fit the caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dlrm.errors import OptionError
from dlrm.placement import Run, split
from dlrm.timeline import Span

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dlrm.model import Dense, DenseKernel

CACHED_ROWS = 256  # of a block, where no size is asked for
VECTORS_ALIGN = 4
KEPT_SPACES = 8  # of different sizes


@dataclass(frozen=True)
class Block:
    """Samples `lo` to `hi` of a slice (counted from its start) at the rows from `row` on of a block of `size` rows."""

    lo: int
    hi: int
    row: int
    size: int

    @property
    def rows(self) -> slice:
        """Where the samples are in the block."""
        return slice(self.row, self.row + self.hi - self.lo)


def blocks(samples: range, size: int) -> list[Block]:
    """Cut a slice of a batch into blocks of `size` rows; 0: into as many as CACHED_ROWS asks for, without padding."""
    if not samples:
        return []
    if size == 0:
        parts = split(len(samples), -(-len(samples) // CACHED_ROWS))
        return [Block(part.start, part.stop, 0, len(part)) for part in parts]
    found = []
    at = samples.start
    while at < samples.stop:
        end = min((at // size + 1) * size, samples.stop)
        found.append(Block(at - samples.start, end - samples.start, at % size, size))
        at = end
    return found


class DenseWork:
    """The dense half of a model with the memory to evaluate it; one for each thread that does."""

    def __init__(self, model: Dense, block: int) -> None:
        self.model, self.block = model, block
        self.assembly = Span()  # bringing vectors together
        self._spaces: dict[int, Workspace] = {}

    def slice(self, samples: range) -> DenseSlice:
        """Begin the work on the samples of a batch that `samples` are."""
        return DenseSlice(self, samples)

    def space(self, rows: int) -> Workspace:
        """Memory for a block of `rows` samples."""
        if rows not in self._spaces:
            while len(self._spaces) >= KEPT_SPACES:
                del self._spaces[next(iter(self._spaces))]
            self._spaces[rows] = Workspace(self.model, rows)
        return self._spaces[rows]


class DenseSlice:
    """A batch's slice on its way: `bottom` at once, `predict` when the pooled vectors are here."""

    def __init__(self, work: DenseWork, samples: range) -> None:
        self._work = work
        self._samples = samples
        self._blocks = blocks(samples, work.block)
        self._bottoms = torch.empty(len(samples), work.model.shape.dim)

    def bottom(self, dense: Tensor) -> None:
        """Evaluate the bottom MLP on this slice of the batch's dense features [B, D]."""
        self.bottom_of(dense[self._samples.start : self._samples.stop])

    def bottom_of(self, mine: Tensor) -> None:
        """Evaluate the bottom MLP on the dense features of the slice itself, [n, D]."""
        for block in self._blocks:
            space = self._work.space(block.size)
            space.inputs[block.rows] = mine[block.lo : block.hi]
            self._bottoms[block.lo : block.hi] = space.bottom()[block.rows]

    def predict(
        self,
        parts: Sequence[Tensor],
        runs: Sequence[Run] | None = None,
        means: Mapping[int, Tensor] | None = None,
        keep: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits [n] and click probabilities [n] of the slice, after `bottom`.

        `parts` are the pooled vectors, a tensor [n, tables of it, dim] per owner; nothing refers to them afterwards.
        `runs` say where they belong (see `Placement.runs`); None: they are in table order. `means`: lengths [n, 1] by
        which tables are divided once all parts of them are here. Assembled, they are copied to `keep` [n, T, dim].
        """
        if runs is None:
            runs = in_order(parts)
        logits, probabilities = torch.empty(len(self._samples)), torch.empty(len(self._samples))
        for block in self._blocks:
            space, own = self._work.space(block.size), slice(block.lo, block.hi)
            with self._work.assembly:
                vectors = space.vectors[block.rows]
                vectors[:, 0] = self._bottoms[own]
                assemble(vectors[:, 1:], parts, runs, means or {}, own)
                if keep is not None:
                    keep[own] = vectors[:, 1:]
            space.top()
            logits[own], probabilities[own] = space.logits[block.rows], space.probabilities[block.rows]
        return logits, probabilities


def assemble(
    out: Tensor, parts: Sequence[Tensor], runs: Sequence[Run], means: Mapping[int, Tensor], own: slice
) -> None:
    """The samples `own` of pooled vectors in parts into `out` [n, T, dim]; see `DenseSlice.predict`."""
    for run in runs:
        to = out[:, run.table : run.table + run.count]
        piece = parts[run.part][own, run.position : run.position + run.count]
        if run.add:
            to += piece
        else:
            to[:] = piece
    for table, lengths in means.items():
        out[:, table] /= lengths[own]


def in_order(parts: Sequence[Tensor]) -> list[Run]:
    """Runs of parts that have all tables in order."""
    starts = accumulate((part.shape[1] for part in parts), initial=0)
    return [Run(number, 0, table, part.shape[1]) for number, (table, part) in enumerate(zip(starts, parts))]  # noqa: B905 - one start too many


class Workspace:
    """Memory for one block of `rows` samples, allocated once, so that evaluating it allocates and copies little.

    The interaction's vectors are padded with zeros to a multiple of VECTORS_ALIGN: such matrices multiply faster.
    """

    def __init__(self, model: Dense, rows: int) -> None:
        shape = model.shape
        self._model = model
        self._pairs = model.pairs
        count = 1 + shape.num_tables
        dot = shape.interaction == "dot"
        self.inputs = torch.zeros(rows, shape.bottom[0])
        self._bottom = _Layers(model.bot_l, rows, model.kernel, True)
        self._top = _Layers(model.top_l, rows, model.kernel, False)
        padded = -(-count // VECTORS_ALIGN) * VECTORS_ALIGN if dot else count
        self._all = torch.zeros(rows, padded, shape.dim)
        self.vectors = self._all[:, :count]
        self._features = torch.empty(rows, shape.top[0])
        if dot:
            self._turned = self._all.transpose(1, 2)
            self._products = torch.empty(rows, padded, padded)
            self._chosen = torch.empty(rows, len(self._pairs))
            self._pairs = torch.div(self._pairs, count, rounding_mode="floor") * padded + self._pairs % count
        self.logits = torch.empty(rows)
        self.probabilities = torch.empty(rows)

    def bottom(self) -> Tensor:
        """The bottom MLP of `inputs`, [rows, dim]; overwritten by the next."""
        return self._bottom(self.inputs)

    def top(self) -> None:
        """Interaction of `vectors` and top MLP: `logits` and `probabilities`."""
        if self._model.shape.interaction == "cat":
            features = self._all.view(len(self._all), -1)
        else:
            torch.bmm(self._all, self._turned, out=self._products)
            products = self._products.view(len(self._products), -1)
            torch.index_select(products, 1, self._pairs, out=self._chosen)
            # One copy; index_select straight into a strided output takes five times as long.
            features = torch.cat([self._all[:, 0], self._chosen], dim=1, out=self._features)
        self.logits.copy_(self._top(features).view(-1))
        torch.sigmoid(self.logits, out=self.probabilities)
        threshold = self._model.loss_threshold
        if 0 < threshold < 1:
            self.probabilities.clamp_(threshold, 1 - threshold)


class _Layers:
    """An MLP's linear layers, with ReLU between them; behind the last only where `rectified` asks for it."""

    def __init__(self, mlp: nn.Sequential, rows: int, kernel: DenseKernel, rectified: bool) -> None:
        layers = [layer for layer in mlp if isinstance(layer, nn.Linear)]
        self._layers = [(layer.weight, layer.bias) for layer in layers]
        self._rectified = [True] * (len(layers) - 1) + [rectified]
        self._onednn = linear_of_onednn() if kernel == "onednn" else None
        self._outs = [] if self._onednn else [torch.empty(rows, layer.out_features) for layer in layers]

    def __call__(self, value: Tensor) -> Tensor:
        if self._onednn is not None:
            for (weight, bias), rectified in zip(self._layers, self._rectified, strict=True):
                value = self._onednn(value, weight, bias, "relu" if rectified else "none", [], "")
            return value
        for (weight, bias), rectified, out in zip(self._layers, self._rectified, self._outs, strict=True):
            value = torch.addmm(bias, value, weight.t(), out=out)
            if rectified:
                value.relu_()
        return value


def linear_of_onednn() -> Any:
    """oneDNN's linear layer with its activation, as torch's compiler uses it. Raises OptionError if it is missing."""
    try:
        return torch.ops.mkldnn._linear_pointwise
    except AttributeError as error:
        raise OptionError("--dense-kernel onednn: this torch has no oneDNN; use --dense-kernel torch") from error
