"""The embedded sample: generated, Criteo-shaped, the same on every rank without exchanging data.

13 integers with the missing rates and heavy tails, and 26 categories with the skews, measured on Criteo Kaggle:
Zipf with s from .78 to .95 for the large tables, 1.8 for C1. Labels come from a planted logistic model of integers
and categories (about one click in four), so that a model fitted to the sample can be told from one that is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from dlrm.data import CRITEO_DENSE
from dlrm.data.batch import Batch, one_hot_offsets

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

SAMPLES = 8192
# Of each integer feature: share missing, and mean and deviation of log(x + 1).
_MISSING = (0.45, 0.0, 0.2, 0.2, 0.05, 0.25, 0.05, 0.0, 0.05, 0.45, 0.05, 0.78, 0.2)
_LOG_MEAN = (0.9, 1.8, 2.0, 1.6, 6.4, 3.6, 1.6, 2.0, 3.6, 0.3, 0.8, 0.3, 1.8)
_LOG_DEVIATION = (1.0, 2.1, 1.3, 1.0, 2.9, 1.8, 1.4, 1.2, 1.7, 0.4, 0.7, 0.6, 1.1)
# Of each category: share missing (row 0), and the Zipf exponent of its rows.
_NO_CATEGORY = {
    2: 0.03,
    3: 0.03,
    5: 0.13,
    11: 0.03,
    15: 0.03,
    18: 0.45,
    19: 0.45,
    20: 0.03,
    21: 0.82,
    23: 0.03,
    24: 0.45,
}
_FIRST_SKEW, _SKEW = 1.8, (0.78, 0.95)


class CriteoSample:
    """`SAMPLES` samples with one-row bags; asked for more, it starts over again."""

    dense_features = CRITEO_DENSE

    def __init__(self, table_rows: tuple[int, ...], seed: int) -> None:
        self.table_rows = table_rows
        random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0xC217E0])))
        logs = _integers(random)
        self.dense = torch.from_numpy(np.log1p(np.floor(np.expm1(logs))).astype(np.float32))
        self.rows = torch.from_numpy(np.stack([_category(random, t, n) for t, n in enumerate(table_rows)]))
        self.logits = _planted(random, logs, self.rows.numpy(), table_rows)  # of the planted model, float64 [SAMPLES]
        clicked = random.random(SAMPLES) < 1.0 / (1.0 + np.exp(-self.logits))
        self.labels = torch.from_numpy(clicked.astype(np.float32))

    def batches(self, batch_size: int, num_batches: int) -> Iterator[Batch]:
        """See `Source.batches`; 0 batches: the sample once."""
        total = num_batches * batch_size or SAMPLES
        for first in range(0, total, batch_size):
            chosen = torch.arange(first, min(first + batch_size, total)) % SAMPLES
            offsets = one_hot_offsets(len(chosen))
            indices = tuple(self.rows[:, chosen].contiguous())
            yield Batch(first, self.dense[chosen], indices, (offsets,) * len(indices), self.labels[chosen])


def _integers(random: np.random.Generator) -> NDArray[np.float64]:
    """log(x + 1) of the integers, [SAMPLES, 13]; missing ones are 0."""
    shape = (SAMPLES, CRITEO_DENSE)
    logs = np.maximum(random.standard_normal(shape) * _LOG_DEVIATION + _LOG_MEAN, 0.0)
    logs[random.random(shape) < _MISSING] = 0.0
    return np.minimum(logs, np.log1p(2.0**31))


def _category(random: np.random.Generator, table: int, rows: int) -> NDArray[np.int64]:
    """Rows of one table, [SAMPLES]: Zipf by popularity, popular rows scattered over the table."""
    skew = _FIRST_SKEW if table == 0 else random.uniform(*_SKEW)
    mass = np.cumsum(np.arange(1, rows + 1, dtype=np.float64) ** -skew)
    popularity = np.searchsorted(mass, random.random(SAMPLES) * mass[-1], side="right").clip(max=rows - 1)
    chosen = random.permutation(rows)[popularity]
    chosen[random.random(SAMPLES) < _NO_CATEGORY.get(table, 0.0)] = 0
    rows_of_samples: NDArray[np.int64] = chosen.astype(np.int64)
    return rows_of_samples


def _planted(
    random: np.random.Generator, logs: NDArray[np.float64], rows: NDArray[np.int64], table_rows: tuple[int, ...]
) -> NDArray[np.float64]:
    """Logits of the planted model, [SAMPLES]: linear in the logarithms, plus an effect for each row of each table."""
    logits = (logs - logs.mean(0)) / (logs.std(0) + 1e-9) @ random.normal(0.0, 0.2, CRITEO_DENSE)
    for table, size in enumerate(table_rows):
        logits += random.normal(0.0, 0.25, size)[rows[table]]
    return np.asarray(logits - logits.mean() - 1.45)
