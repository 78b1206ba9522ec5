"""Recorded accesses: one row number a line (Meta's), or all of them in one line apart by commas (the reference's)."""

from __future__ import annotations

from itertools import count, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dlrm.data.batch import Batch, one_hot_offsets
from dlrm.data.streams import open_text, whole_lines
from dlrm.data.uniform import batch_generator
from dlrm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray


class Traces:
    """A table for each file; a bag is the next `lookups` accesses of its table. Dense features are drawn uniformly.

    The samples end where the first trace does; accesses that do not fill a bag are left out.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        dense_features: int,
        rows: tuple[int, ...],
        lookups: tuple[int, ...],
        seed: int,
    ) -> None:
        self.files = [Path(file) for file in files]
        self.dense_features, self.table_rows = dense_features, rows
        self._lookups, self._seed = lookups, seed
        if len(rows) != len(files):
            raise DataError(files[0], f"{len(files)} traces, but the model has {len(rows)} tables")
        for file in files:
            with open_text(file):
                pass

    def batches(self, batch_size: int, num_batches: int) -> Iterator[Batch]:
        """See `Source.batches`. Raises DataError at the first malformed line."""
        streams = [_Accesses(file) for file in self.files]
        for number in islice(count(), num_batches or None):
            drawn = [stream.take(batch_size * hot) for stream, hot in zip(streams, self._lookups, strict=True)]
            size = min(len(rows) // hot for rows, hot in zip(drawn, self._lookups, strict=True))
            if not size:
                return
            random = batch_generator(self._seed, number)
            dense = torch.from_numpy(random.random((batch_size, self.dense_features), dtype=np.float32)[:size])
            indices = tuple(
                torch.from_numpy(rows[: size * hot]) for rows, hot in zip(drawn, self._lookups, strict=True)
            )
            offsets = tuple(one_hot_offsets(size) * hot for hot in self._lookups)
            yield Batch(number * batch_size, dense, indices, offsets)
            if size < batch_size:
                return


class _Accesses:
    """The numbers of a trace, in order."""

    def __init__(self, path: Path) -> None:
        self._blocks = self._parsed(path)
        self._held = np.empty(0, np.int64)

    def take(self, number: int) -> NDArray[np.int64]:
        """The next ones, fewer at the end."""
        parts, have = [self._held], len(self._held)
        while have < number:
            block = next(self._blocks, None)
            if block is None:
                break
            parts.append(block)
            have += len(block)
        joined = np.concatenate(parts)
        self._held = joined[number:]
        return joined[:number]

    def _parsed(self, path: Path) -> Iterator[NDArray[np.int64]]:
        for first, data in whole_lines(path):
            words = data.replace(b",", b" ").split()
            if not words:
                continue
            try:
                yield np.array(words).astype(np.int64)
            except (ValueError, OverflowError):
                raise self._malformed(path, data, first) from None

    def _malformed(self, path: Path, data: bytes, first: int) -> DataError:
        for position, line in enumerate(data.splitlines()):
            for word in line.replace(b",", b" ").split():
                if not word.removeprefix(b"-").isdigit() or len(word) > 18:
                    value = word.decode("utf-8", "backslashreplace")
                    return DataError(path, "is not a row number", line=first + position, value=value)
        return DataError(path, "cannot be parsed", line=first)
