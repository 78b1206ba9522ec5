"""Row numbers with given LRU stack distances: the reference's `--data-generation synthetic`.

A file has three lines, numbers apart by commas: the rows that are accessed; stack distances, 0 for a row not seen
before; and the cumulated probabilities of these. The reference starts every bag anew; here a batch is one trace.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dlrm.data.batch import Batch
from dlrm.data.uniform import BATCHES, batch_generator, bounds, lengths
from dlrm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


class Distances:
    """A table's rows and stack distances, from a file. Raises DataError."""

    def __init__(self, path: str | Path) -> None:
        try:
            lines = Path(path).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(path, f"cannot be read: {error}") from error
        values: list[list[float]] = []
        for number in range(3):
            text = lines[number] if number < len(lines) else ""
            try:
                values.append([float(word) for word in text.split(",")])
            except ValueError:
                raise DataError(path, "is not a list of numbers", line=number + 1, value=text) from None
        self.rows = [int(value) for value in values[0]]
        self.distances = [int(value) for value in values[1]]
        self.cumulated = values[2]
        if len(self.distances) != len(self.cumulated):
            problem = f"{len(self.cumulated)} probabilities for {len(self.distances)} distances"
            raise DataError(path, problem, line=3)
        if self.distances[0] != 0 or max(self.distances) > len(self.rows):
            problem = f"distances must begin with 0 and be no more than the {len(self.rows)} rows"
            raise DataError(path, problem, line=2)
        if sorted(self.cumulated) != self.cumulated or abs(self.cumulated[-1] - 1) > 1e-6:
            raise DataError(path, "cumulated probabilities must rise to 1", line=3)

    def trace(self, random: np.random.Generator, count: int) -> NDArray[np.int64]:
        """`count` accesses: a new row in turn, or the one last seen `distance` accesses to other rows ago."""
        stack = list(self.rows)  # the row seen last at the end
        found = np.empty(count, np.int64)
        new = 0
        for position, draw in enumerate(random.random(count).tolist()):
            if new < self.distances[-1]:  # no distance beyond the rows seen so far
                known = bisect_right(self.distances, new) - 1
                draw *= self.cumulated[known]
            distance = self.distances[min(bisect_left(self.cumulated, draw), len(self.distances) - 1)]
            new += distance == 0
            row = stack.pop(len(stack) - distance if distance else 0)
            stack.append(row)
            found[position] = row
        return found


class StackDistance:
    """Batches with dense features drawn uniformly; table t follows `path`, whose j, where it has one, is t."""

    def __init__(
        self,
        path: str,
        dense_features: int,
        table_rows: tuple[int, ...],
        seed: int,
        lookups: tuple[int, ...],
        fixed: bool,
    ) -> None:
        self.dense_features, self.table_rows = dense_features, table_rows
        self._seed, self._lookups, self._fixed = seed, lookups, fixed
        folder, name = Path(path).parent, Path(path).name
        opened: dict[str, Distances] = {}
        self._tables = []
        for table in range(len(table_rows)):
            own = name.replace("_j.", f"_{table}.")
            if own not in opened:
                opened[own] = Distances(folder / own)
            self._tables.append(opened[own])

    def batches(self, batch_size: int, num_batches: int) -> Iterator[Batch]:
        """See `Source.batches`; 0 batches: BATCHES. Rows beyond a table are taken modulo its size."""
        for number in range(num_batches or BATCHES):
            random = batch_generator(self._seed, number)
            dense = torch.from_numpy(random.random((batch_size, self.dense_features), dtype=np.float32))
            indices, offsets = [], []
            for rows, lookups, distances in zip(self.table_rows, self._lookups, self._tables, strict=True):
                sizes = lengths(random, batch_size, lookups, self._fixed)
                offsets.append(bounds(sizes))
                indices.append(torch.from_numpy(distances.trace(random, int(sizes.sum())) % rows))
            yield Batch(number * batch_size, dense, tuple(indices), tuple(offsets))
