"""The dense work of one rank for one batch: its slice of the samples, whole or in blocks of fixed shape.

How a matrix product, and a sigmoid, rounds depends on the shape it is given, on the row a sample sits in (the last
rows and elements take other code paths) and on alignment. With a block size B the batch is cut into blocks of B
rows that start at multiples of B in the *batch*, and a sample always sits in the same row of its block, whichever
rank evaluates it; rows of other ranks are padding. Every tensor that enters a matrix product is allocated for it,
so it is 64-byte aligned. Then the bits depend neither on the number of ranks nor on who owns which sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dlrm.placement import Run

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from dlrm.model import Dense


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
    """Cut a slice of a batch into blocks; `size` 0: one block of exactly the slice."""
    if not samples:
        return []
    if size == 0:
        return [Block(0, len(samples), 0, len(samples))]
    found = []
    at = samples.start
    while at < samples.stop:
        end = min((at // size + 1) * size, samples.stop)
        found.append(Block(at - samples.start, end - samples.start, at % size, size))
        at = end
    return found


class DenseSlice:
    """A batch's slice on its way: `bottom` at once, `fill` when the pooled vectors are here, then `predict`."""

    def __init__(self, model: Dense, samples: range, block: int) -> None:
        self._model = model
        self._samples = samples
        self._blocks = blocks(samples, block)
        self._bottoms: list[Tensor] = []
        self._vectors: list[Tensor] = []

    def bottom(self, dense: Tensor) -> None:
        """Evaluate the bottom MLP on this slice of the batch's dense features [B, D]."""
        self.bottom_of(dense[self._samples.start : self._samples.stop])

    def bottom_of(self, mine: Tensor) -> None:
        """Evaluate the bottom MLP on the dense features of the slice itself, [n, D]."""
        for block in self._blocks:
            rows = torch.zeros(block.size, mine.shape[1])
            rows[block.rows] = mine[block.lo : block.hi]
            self._bottoms.append(self._model.bottom(rows))

    def fill(
        self, parts: Sequence[Tensor], runs: Sequence[Run] | None = None, means: Mapping[int, Tensor] | None = None
    ) -> None:
        """Copy the pooled vectors, a tensor [n, tables of it, dim] per owner; then they may go.

        `runs` say where they belong (see `Placement.runs`); None: they are in table order. `means`: lengths [n, 1] by
        which tables are divided once all parts of them are here.
        """
        shape = self._model.shape
        if runs is None:
            starts = accumulate((part.shape[1] for part in parts), initial=0)
            runs = [Run(number, 0, table, part.shape[1]) for number, (table, part) in enumerate(zip(starts, parts))]  # noqa: B905 - one start too many
        for block, bottom in zip(self._blocks, self._bottoms, strict=True):
            padded = block.hi - block.lo < block.size
            vectors = (torch.zeros if padded else torch.empty)(block.size, 1 + shape.num_tables, shape.dim)
            vectors[:, 0] = bottom
            for run in runs:
                to = vectors[block.rows, 1 + run.table : 1 + run.table + run.count]
                piece = parts[run.part][block.lo : block.hi, run.position : run.position + run.count]
                if run.add:
                    to += piece
                else:
                    to[:] = piece
            for table, lengths in (means or {}).items():
                vectors[block.rows, 1 + table] /= lengths[block.lo : block.hi]
            self._vectors.append(vectors)

    def predict(self) -> tuple[Tensor, Tensor]:
        """Logits [n] and click probabilities [n] of the slice, after `bottom` and `fill`."""
        logits, probabilities = torch.empty(len(self._samples)), torch.empty(len(self._samples))
        for block, vectors in zip(self._blocks, self._vectors, strict=True):
            all_logits, all_probabilities = self._model.top(vectors)
            logits[block.lo : block.hi] = all_logits[block.rows]
            probabilities[block.lo : block.hi] = all_probabilities[block.rows]
        return logits, probabilities

    def pooled(self) -> Tensor:
        """A copy of the pooled vectors as received, [n, T, dim], after `fill`."""
        shape = self._model.shape
        copy = torch.empty(len(self._samples), shape.num_tables, shape.dim)
        for block, vectors in zip(self._blocks, self._vectors, strict=True):
            copy[block.lo : block.hi] = vectors[block.rows, 1:]
        return copy
