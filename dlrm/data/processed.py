"""The reference's processed Criteo data: a .npz of X_int [N, 13], X_cat [N, 26], y [N] and, in most, counts [26].

Integers are as in the raw file, negative ones 0; log(x + 1) is taken here. Categories are row numbers already.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlrm.data import CRITEO_DENSE, criteo_rows
from dlrm.data.batch import Batch, recut
from dlrm.data.columns import one_hot
from dlrm.data.npz import members, need
from dlrm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK = 8192
TABLES = 26


class ProcessedNpz:
    """A processed file as a data set with one-row bags; tables have `rows`, or what counts says."""

    dense_features = CRITEO_DENSE

    def __init__(self, path: str | Path, rows: tuple[int, ...] | None, max_ind_range: int) -> None:
        self.path, self.max_ind_range = Path(path), max_ind_range
        found = members(path)
        integers, categories, _ = need(found, path, "X_int", "X_cat", "y")
        if integers.shape[1:] != (CRITEO_DENSE,) or categories.shape[1:] != (TABLES,):
            raise DataError(path, f"X_int is {integers.shape} and X_cat {categories.shape}, wanted 13 and 26 columns")
        counts = found["counts"].take(TABLES) if "counts" in found else None
        known = criteo_rows(-1) if counts is None else tuple(int(count) for count in counts)
        self.table_rows = rows or criteo_rows(max_ind_range, known)

    def batches(self, batch_size: int, num_batches: int) -> Iterator[Batch]:
        """See `Source.batches`."""
        return recut(self._chunks(), batch_size, num_batches)

    def _chunks(self) -> Iterator[Batch]:
        integers, categories, labels = need(members(self.path), self.path, "X_int", "X_cat", "y")
        if not labels.shape[0]:
            raise DataError(self.path, "has no samples")
        while True:
            numbers = integers.take(CHUNK)
            if not len(numbers):
                return
            dense = np.log1p(np.maximum(numbers, 0).astype(np.float64)).astype(np.float32)
            rows = categories.take(CHUNK).T.astype(np.int64)
            yield one_hot(dense, rows, labels.take(CHUNK), self.max_ind_range)
