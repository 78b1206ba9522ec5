"""Random batches of any shape: the reference's `--data-generation random`, without labels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from dlrm.data.batch import Batch
from dlrm.data.draws import UniformDraw

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from dlrm.data.draws import Draw

BATCHES = 64  # where no number is asked for


class Uniform:
    """Dense features drawn uniformly and rows by `draw`; a bag has `lookups` rows (fixed), or 1 to `lookups` of them.

    `lookups` is one number for all tables or one for each. The reference draws the rows of a bag, then sorts and
    dedupes them; here a row may repeat within a bag.
    """

    def __init__(
        self,
        dense_features: int,
        table_rows: tuple[int, ...],
        seed: int,
        lookups: int | tuple[int, ...],
        fixed: bool,
        draw: Draw | None = None,
    ) -> None:
        self.dense_features = dense_features
        self.table_rows = table_rows
        self._seed, self._fixed = seed, fixed
        self._lookups = (lookups,) * len(table_rows) if isinstance(lookups, int) else lookups
        self._draw = draw or UniformDraw()

    def batches(self, batch_size: int, num_batches: int) -> Iterator[Batch]:
        """See `Source.batches`; 0 batches: BATCHES. Each batch has a seed of its own."""
        for number in range(num_batches or BATCHES):
            random = batch_generator(self._seed, number)
            dense = torch.from_numpy(random.random((batch_size, self.dense_features), dtype=np.float32))
            indices, offsets = [], []
            shared: dict[int, torch.Tensor] = {}  # offsets of tables whose bags are all of one size
            for table, (rows, lookups) in enumerate(zip(self.table_rows, self._lookups, strict=True)):
                sizes = lengths(random, batch_size, lookups, self._fixed)
                ends = shared.get(lookups) if self._fixed else None
                offsets.append(bounds(sizes) if ends is None else ends)
                shared[lookups] = offsets[-1]
                indices.append(torch.from_numpy(self._draw.rows(random, table, rows, sizes)))
            yield Batch(number * batch_size, dense, tuple(indices), tuple(offsets))


def batch_generator(seed: int, number: int) -> np.random.Generator:
    """The generator of one batch."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0x0D17, number])))


def lengths(random: np.random.Generator, bags: int, lookups: int, fixed: bool) -> NDArray[np.int64]:
    """Rows of each bag: `lookups`, or 1 to `lookups`."""
    return np.full(bags, lookups, np.int64) if fixed else random.integers(1, lookups + 1, bags)


def bounds(sizes: NDArray[np.int64]) -> torch.Tensor:
    """Offsets [bags + 1] of bags of `sizes`."""
    ends = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=ends[1:])
    return torch.from_numpy(ends)
