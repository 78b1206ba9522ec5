"""Uniformly random batches of any shape: the reference's `--data-generation random`, without labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from dlrm.data.batch import Batch

if TYPE_CHECKING:
    from collections.abc import Iterator


class Uniform:
    """Dense features and rows drawn uniformly; a bag has `lookups` rows (fixed), or 1 to `lookups` of them.

    The reference draws the rows of a bag, then sorts and dedupes them; here a row may repeat within a bag.
    """

    def __init__(self, dense_features: int, table_rows: tuple[int, ...], seed: int, lookups: int, fixed: bool) -> None:
        self.dense_features = dense_features
        self.table_rows = table_rows
        self._seed, self._lookups, self._fixed = seed, lookups, fixed

    def batches(self, batch_size: int, num_batches: int) -> Iterator[Batch]:
        """See `Source.batches`; 0 batches: 64. Each batch has a seed of its own."""
        for number in range(num_batches or 64):
            random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, 0x0D17, number])))
            dense = torch.from_numpy(random.random((batch_size, self.dense_features), dtype=np.float32))
            indices, offsets = [], []
            for rows in self.table_rows:
                lengths = np.full(batch_size, self._lookups)
                if not self._fixed:
                    lengths = random.integers(1, self._lookups + 1, batch_size)
                ends = np.concatenate([[0], np.cumsum(lengths)])
                offsets.append(torch.from_numpy(ends.astype(np.int64)))
                indices.append(torch.from_numpy(random.integers(0, rows, int(ends[-1]), dtype=np.int64)))
            yield Batch(number * batch_size, dense, tuple(indices), tuple(offsets))
