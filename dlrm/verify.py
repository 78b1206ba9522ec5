"""The same run once more in a single process, to compare bits with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dlrm.dense import DenseWork
from dlrm.tables import lengths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from dlrm.data.batch import Batch
    from dlrm.model import Dense
    from dlrm.placement import Placement
    from dlrm.tables import Tables


class SingleProcess:
    """All tables and the dense model in one place, evaluated in the slices that the ranks evaluate.

    Matrix products of other shapes round differently, so the slices are those of the ranks of `placement`, or the
    blocks they use: what is compared has the same shapes, and any difference is one of values.
    """

    def __init__(
        self, tables: Tables, dense: Dense, placement: Placement, block: int, parts: Sequence[Tables] = ()
    ) -> None:
        """`parts`: the pieces of tables that are cut by rows, in rank order; `tables` has all others, whole."""
        self.dense = dense
        self._tables, self._dense, self._placement = tables, DenseWork(dense, block), placement
        self._parts = parts

    def evaluate(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled vectors [B, T, dim], logits [B] and click probabilities [B] of a batch."""
        with torch.inference_mode():
            pooled = self.lookup(batch)
            logits, probabilities = [], []
            for samples in self._placement.samples(batch.size):
                piece = self._dense.slice(samples)
                piece.bottom(batch.dense)
                piece_logits, piece_probabilities = piece.predict([pooled[samples.start : samples.stop]])
                logits.append(piece_logits)
                probabilities.append(piece_probabilities)
        return pooled, torch.cat(logits), torch.cat(probabilities)

    def lookup(self, batch: Batch) -> Tensor:
        """Pooled vectors [B, T, dim] of a batch."""
        whole = self._tables.lookup_all(batch)
        if not self._parts:
            return whole
        pooled = torch.empty(batch.size, self._placement.num_tables, self._tables.dim)
        for position, table in enumerate(self._tables.tables):
            pooled[:, table] = whole[:, position]
        seen: set[int] = set()
        for part in self._parts:
            (table,) = part.tables
            sums = part.lookup_all(batch)[:, 0]
            pooled[:, table] = pooled[:, table] + sums if table in seen else sums
            seen.add(table)
        if self._tables.pooling == "mean":
            for table in seen:
                pooled[:, table] /= lengths(batch, table)
        return pooled


def first_difference(what: str, got: NDArray[np.float32], wanted: NDArray[np.float32], first: int) -> str | None:
    """Where two float32 arrays [B, ...] differ in a bit, in words, or None. `first` is the number of sample 0.

    Arrays of three dimensions are pooled vectors [B, T, dim], and the table is named, too.
    """
    if got.shape != wanted.shape:
        return f"{what}: {got.shape[0]} samples came, wanted {wanted.shape[0]}"
    differs = got.view(np.uint32) != wanted.view(np.uint32)
    if not differs.any():
        return None
    place = tuple(int(index) for index in np.argwhere(differs)[0])
    table = f", table {place[1]}, element {place[2]}" if got.ndim == 3 else ""
    values = f"{got[place]!r}, wanted {wanted[place]!r}"
    return f"{what} differ first at sample {first + place[0]} (position {place[0]} of its batch){table}: {values}"
