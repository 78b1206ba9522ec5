r"""Criteo's display advertising format, plain or gzip: label TAB 13 integers TAB 26 hex categories, a sample a line.

What a line may look like, and what becomes of it:

* Missing fields are empty; missing fields at the end of the line may be absent altogether, tabs and all (files in
  the wild have 37 or 38 of the 40 fields). The label and the 13 integers must be there, empty or not. Lines end in
  LF or CR LF.
* An integer becomes log(x + 1), negative and missing ones count as 0.
* A category is an unsigned 32-bit number in hex; missing counts as 0. Its row is `number % --max-ind-range` (where
  that is not negative) `% rows of the table`. The reference renumbers categories by first appearance instead, which
  needs a pass over the whole file; hashing by remainder needs none, and gives the same row for the same category in
  every file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dlrm.data import CRITEO_DENSE
from dlrm.data.batch import Batch, one_hot_offsets, recut
from dlrm.data.fields import decimal, hexadecimal, separate
from dlrm.data.streams import open_text, whole_lines
from dlrm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

CATEGORIES = 26
FIELDS = 1 + CRITEO_DENSE + CATEGORIES
_INTEGER = rb"-?[0-9]{1,18}"
_CATEGORY = rb"[0-9a-fA-F]{1,8}"
_LINE = re.compile(rb"[01](?:\t(?:%s)?){%d}(?:\t(?:%s)?){0,%d}" % (_INTEGER, CRITEO_DENSE, _CATEGORY, CATEGORIES))
_NATURAL = re.compile(rb"[0-9]{1,18}")


class CriteoFile:
    """A Criteo file as a data set with one-row bags; reads as a stream, memory does not grow with the file."""

    dense_features = CRITEO_DENSE

    def __init__(self, path: str | Path, table_rows: tuple[int, ...], max_ind_range: int = -1) -> None:
        self.path = Path(path)
        self.table_rows = table_rows
        self.max_ind_range = max_ind_range
        if len(table_rows) != CATEGORIES:
            raise DataError(path, f"a Criteo file has {CATEGORIES} categories, the model {len(table_rows)} tables")
        with open_text(path):  # an unreadable file is reported now, not when the first batch is wanted
            pass

    def batches(self, batch_size: int, num_batches: int) -> Iterator[Batch]:
        """See `Source.batches`. Raises DataError at the first malformed line, naming line and field."""
        return recut(self._chunks(), batch_size, num_batches)

    def _chunks(self) -> Iterator[Batch]:
        empty = True
        for first, data in whole_lines(self.path):
            empty = False
            parsed = _parse(data)
            if parsed is None:
                yield from self._checked(data, first)
            else:
                yield self._batch(*parsed)
        if empty:
            raise DataError(self.path, "has no samples")

    def _checked(self, data: bytes, first: int) -> Iterator[Batch]:
        """The lines before the malformed one, then its DataError; `first` is the number of the first line."""
        lines = data.splitlines(keepends=True)
        for position, line in enumerate(lines):
            bare = line.removesuffix(b"\n").removesuffix(b"\r")
            if not _LINE.fullmatch(bare):
                parsed = _parse(b"".join(lines[:position])) if position else None
                if parsed is not None:
                    yield self._batch(*parsed)
                raise self._malformed(bare, first + position)
        raise DataError(self.path, "cannot be parsed", line=first)

    def _batch(self, labels: NDArray[np.float32], integers: NDArray[np.int64], categories: NDArray[np.uint32]) -> Batch:
        """Labels [B], integers [B, 13], negative ones as 0, and categories [26, B] as a batch."""
        limited = 0 < self.max_ind_range < 1 << 32
        if limited:
            categories = categories % np.uint32(self.max_ind_range)
        for table, size in enumerate(self.table_rows):
            if size < (self.max_ind_range if limited else 1 << 32):
                categories[table] %= np.uint32(size)
        rows = categories.astype(np.int64)
        offsets = one_hot_offsets(len(labels))
        return Batch(
            0,
            torch.from_numpy(np.log1p(integers.astype(np.float64)).astype(np.float32)),
            tuple(torch.from_numpy(rows)),
            (offsets,) * CATEGORIES,
            torch.from_numpy(labels),
        )

    def _malformed(self, line: bytes, number: int) -> DataError:
        """The error for a line that does not match, naming the first field that is wrong."""
        fields = line.split(b"\t")
        for position, field in enumerate(fields[:FIELDS]):
            value = field.decode("utf-8", "backslashreplace")
            if position == 0:
                name, pattern, wanted = "label", rb"[01]", "is not a label (0 or 1)"
            elif position <= CRITEO_DENSE:
                name, pattern, wanted = f"I{position}", rb"(?:%s)?" % _INTEGER, "is not an integer of up to 18 digits"
            else:
                name, wanted = f"C{position - CRITEO_DENSE}", "is not a category of up to 8 hex digits"
                pattern = rb"(?:%s)?" % _CATEGORY
            if not re.fullmatch(pattern, field):
                return DataError(self.path, wanted, line=number, field=f"{position + 1} ({name})", value=value)
        needed = f"label and {CRITEO_DENSE} integers at least, {FIELDS} at most"
        return DataError(self.path, f"{len(fields)} fields, wanted {needed}", line=number)


def _parse(data: bytes) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.uint32]] | None:
    """Labels [B], integers [B, 13], negative ones as 0, categories [26, B] of whole lines; None if any is malformed."""
    padded, starts, lengths, fields = separate(data)
    if (fields == FIELDS).all():
        starts, lengths = starts.reshape(-1, FIELDS), lengths.reshape(-1, FIELDS)
    else:
        if fields.min() < 1 + CRITEO_DENSE or fields.max() > FIELDS:
            return None
        place = (np.cumsum(fields) - fields)[:, None] + np.arange(FIELDS)
        there = np.arange(FIELDS) < fields[:, None]
        place = np.where(there, place, 0)
        starts, lengths = starts[place], np.where(there, lengths[place], 0)
    labels = padded[starts[:, 0]] - np.uint8(ord("0"))
    if (labels > 1).any() or (lengths[:, 0] != 1).any():
        return None
    categories, good = hexadecimal(
        padded,
        np.ascontiguousarray(starts[:, 1 + CRITEO_DENSE :].T),
        np.ascontiguousarray(lengths[:, 1 + CRITEO_DENSE :].T),
    )
    if not good:
        return None
    begin = np.ascontiguousarray(starts[:, 1 : 1 + CRITEO_DENSE])
    length = np.ascontiguousarray(lengths[:, 1 : 1 + CRITEO_DENSE])
    negative = (padded[begin] == ord("-")) & (length > 0)
    begin += negative
    length -= negative
    integers, fine = decimal(padded, begin, length)
    fine &= (length > 0) | ~negative
    for line, column in np.argwhere(~fine):  # longer than eight digits, or malformed
        text = data[begin[line, column] : begin[line, column] + length[line, column]]
        if not _NATURAL.fullmatch(text):
            return None
        integers[line, column] = int(text)
    integers[negative] = 0
    return labels.astype(np.float32), integers, categories
