"""MLPerf's forms of Criteo Terabyte, memory-mapped.

* v1: one binary file, 40 int32 a row: label, 13 integers, 26 row numbers; table sizes in a *_fea_count.npz beside it.
* TorchRec: a folder of day_{i}_dense.npy (float32, logarithms already), day_{i}_sparse.npy and day_{i}_labels.npy, or
  one day named by its dense file. Sparse numbers are taken modulo the table, as TorchRec does; they may be negative.
* v2: the same with day_{i}_sparse_multi_hot.npz, arrays "0" to "25", each [N, hotness of the table], row numbers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dlrm.data import CRITEO_DENSE, TERABYTE_ROWS, criteo_rows
from dlrm.data.batch import Batch, recut
from dlrm.data.columns import fixed_hot, one_hot
from dlrm.data.npz import members, need
from dlrm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

CHUNK = 8192
TABLES = 26
_WORDS = 1 + CRITEO_DENSE + TABLES
_DAY = re.compile(r"day_(\d+)_dense\.npy")


class MlperfBinary:
    """The v1 binary file as a data set with one-row bags."""

    dense_features = CRITEO_DENSE

    def __init__(self, path: str | Path, rows: tuple[int, ...] | None, max_ind_range: int) -> None:
        self.path, self.max_ind_range = Path(path), max_ind_range
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise DataError(path, f"cannot be opened: {error.strerror or error}") from error
        if not size or size % (4 * _WORDS):
            raise DataError(path, f"has {size} bytes, wanted samples of {4 * _WORDS} bytes")
        self.samples = size // (4 * _WORDS)
        self.table_rows = rows or criteo_rows(max_ind_range, self._counts())

    def batches(self, batch_size: int, num_batches: int) -> Iterator[Batch]:
        """See `Source.batches`."""
        return recut(self._chunks(), batch_size, num_batches)

    def _counts(self) -> tuple[int, ...]:
        """Table sizes of the file beside it; MLPerf's where there is none."""
        beside = sorted(self.path.parent.glob("*_fea_count.npz"))
        if not beside:
            return TERABYTE_ROWS
        (counts,) = need(members(beside[0]), beside[0], "counts")
        if counts.shape != (TABLES,):
            raise DataError(beside[0], f"counts are {counts.shape}, wanted ({TABLES},)")
        return tuple(int(count) for count in counts.take(TABLES))

    def _chunks(self) -> Iterator[Batch]:
        for start in range(0, self.samples, CHUNK):
            count = min(CHUNK, self.samples - start)
            words = np.fromfile(self.path, "<i4", count * _WORDS, offset=start * 4 * _WORDS).reshape(count, _WORDS)
            dense = np.log1p(np.maximum(words[:, 1 : 1 + CRITEO_DENSE], 0).astype(np.float64)).astype(np.float32)
            rows = words[:, 1 + CRITEO_DENSE :].T.astype(np.int64)
            yield one_hot(dense, rows, words[:, 0], self.max_ind_range)


class NpyDays:
    """TorchRec's, or MLPerf v2's, days as a data set."""

    dense_features = CRITEO_DENSE

    def __init__(self, path: str | Path, rows: tuple[int, ...], max_ind_range: int) -> None:
        self.path, self.table_rows, self.max_ind_range = Path(path), rows, max_ind_range
        if len(rows) != TABLES:
            raise DataError(path, f"has {TABLES} categories, the model {len(rows)} tables")
        names = sorted(self.path.glob("day_*_dense.npy")) if self.path.is_dir() else [self.path]
        self._days = sorted((int(match[1]), name) for name in names if (match := _DAY.fullmatch(name.name)))
        if not self._days:
            raise DataError(path, "has no day_{i}_dense.npy")
        for _, name in self._days:
            _mapped(name)

    def batches(self, batch_size: int, num_batches: int) -> Iterator[Batch]:
        """See `Source.batches`; days follow each other in the order of their numbers."""
        return recut(self._chunks(), batch_size, num_batches)

    def _chunks(self) -> Iterator[Batch]:
        for day, name in self._days:
            dense, labels = _mapped(name), _mapped(name.with_name(f"day_{day}_labels.npy"))
            many = name.with_name(f"day_{day}_sparse_multi_hot.npz")
            single = name.with_name(f"day_{day}_sparse.npy")
            if dense.shape[1:] != (CRITEO_DENSE,) or len(labels) != len(dense):
                raise DataError(
                    name, f"is {dense.shape} with {len(labels)} labels, wanted 13 columns and as many labels"
                )
            if many.is_file():
                arrays = need(members(many), many, *map(str, range(TABLES)))
                if arrays[0].shape[0] != len(dense):
                    raise DataError(many, f"has {arrays[0].shape[0]} samples, {name.name} {len(dense)}")
                for lo in range(0, len(dense), CHUNK):
                    rows = [array.take(CHUNK) for array in arrays]
                    yield fixed_hot(dense[lo : lo + CHUNK], rows, labels[lo : lo + CHUNK], self.max_ind_range)
                continue
            sparse = _mapped(single)
            if sparse.shape != (len(dense), TABLES):
                raise DataError(single, f"is {sparse.shape}, wanted {(len(dense), TABLES)}")
            sizes = np.array(self.table_rows)[:, None]
            for lo in range(0, len(dense), CHUNK):
                rows_of = sparse[lo : lo + CHUNK].T.astype(np.int64) % sizes
                yield one_hot(dense[lo : lo + CHUNK], rows_of, labels[lo : lo + CHUNK])


def _mapped(path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise DataError(path, f"cannot be opened: {error}") from error
    if array.dtype.kind not in "iuf" or not array.ndim:
        raise DataError(path, f"is {array.dtype} {array.shape}, wanted rows of numbers")
    return array
