"""The dense work of one rank for one batch: its slice of the samples, whole or in blocks of fixed shape.

How a matrix product, and a sigmoid, rounds depends on the shape it is given, on the row a sample sits in (the last
rows and elements take other code paths) and on alignment. With a block size B the batch is cut into blocks of B
rows that start at multiples of B in the *batch*, and a sample always sits in the same row of its block, whichever
rank evaluates it; rows of other ranks are padding. Every tensor that enters a matrix product is allocated for it,
so it is 64-byte aligned. Then the bits depend neither on the number of ranks nor on who owns which sample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

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
        mine = dense[self._samples.start : self._samples.stop]
        for block in self._blocks:
            rows = torch.zeros(block.size, mine.shape[1])
            rows[block.rows] = mine[block.lo : block.hi]
            self._bottoms.append(self._model.bottom(rows))

    def fill(self, parts: Sequence[Tensor]) -> None:
        """Copy the pooled vectors, a tensor [n, tables of it, dim] per owner in table order; then they may go."""
        shape = self._model.shape
        for block, bottom in zip(self._blocks, self._bottoms, strict=True):
            padded = block.hi - block.lo < block.size
            vectors = (torch.zeros if padded else torch.empty)(block.size, 1 + shape.num_tables, shape.dim)
            vectors[:, 0] = bottom
            table = 1
            for part in parts:
                vectors[block.rows, table : table + part.shape[1]] = part[block.lo : block.hi]
                table += part.shape[1]
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
