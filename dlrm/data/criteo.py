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

import gzip
import re
import zlib
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import numpy as np
import torch

from dlrm.data import CRITEO_DENSE
from dlrm.data.batch import Batch, one_hot_offsets
from dlrm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

CATEGORIES = 26
FIELDS = 1 + CRITEO_DENSE + CATEGORIES
_INTEGER = rb"-?[0-9]{1,18}"
_CATEGORY = rb"[0-9a-fA-F]{1,8}"
_LINE = re.compile(rb"[01](?:\t(?:%s)?){%d}(?:\t(?:%s)?){0,%d}" % (_INTEGER, CRITEO_DENSE, _CATEGORY, CATEGORIES))
_GZIP_MAGIC = b"\x1f\x8b"


class CriteoFile:
    """A Criteo file as a data set with one-row bags; reads as a stream, memory does not grow with the file."""

    dense_features = CRITEO_DENSE

    def __init__(self, path: str | Path, table_rows: tuple[int, ...], max_ind_range: int = -1) -> None:
        self.path = Path(path)
        self.table_rows = table_rows
        self.max_ind_range = max_ind_range
        if len(table_rows) != CATEGORIES:
            raise DataError(path, f"a Criteo file has {CATEGORIES} categories, the model {len(table_rows)} tables")
        with self._open():  # an unreadable file is reported now, not when the first batch is wanted
            pass

    def batches(self, batch_size: int, num_batches: int) -> Iterator[Batch]:
        """See `Source.batches`. Raises DataError at the first malformed line, naming line and field."""
        rows = np.array(self.table_rows, np.int64)
        first = 0
        with self._open() as stream:
            lines = self._lines(stream)
            while batch := list(islice(lines, batch_size)):
                labels, integers, categories = self._parse(batch, first)
                if self.max_ind_range > 0:
                    categories %= self.max_ind_range
                columns = torch.from_numpy(np.ascontiguousarray((categories % rows).T))
                offsets = one_hot_offsets(len(batch))
                yield Batch(
                    first,
                    torch.from_numpy(np.log1p(np.maximum(integers, 0).astype(np.float64)).astype(np.float32)),
                    tuple(columns),
                    (offsets,) * CATEGORIES,
                    torch.from_numpy(labels),
                )
                first += len(batch)
                if num_batches and first >= num_batches * batch_size:
                    return
        if first == 0:
            raise DataError(self.path, "has no samples")

    def _open(self) -> BinaryIO:
        try:
            with self.path.open("rb") as probe:
                compressed = probe.read(2) == _GZIP_MAGIC
            return cast("BinaryIO", gzip.open(self.path, "rb")) if compressed else self.path.open("rb")
        except OSError as error:
            raise DataError(self.path, f"cannot be opened: {error.strerror or error}") from error

    def _lines(self, stream: BinaryIO) -> Iterator[bytes]:
        number = 0
        try:
            for line in stream:
                number += 1
                yield line
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(self.path, f"cannot be read on: {error}", line=number + 1) from error

    def _parse(
        self, lines: list[bytes], first: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
        """Labels [B], integers [B, 13] and categories [B, 26] of lines whose first one is sample `first`."""
        rows: list[list[int]] = []
        for position, raw in enumerate(lines):
            line = raw.rstrip(b"\r\n")
            if not _LINE.fullmatch(line):
                raise self._malformed(line, first + position + 1)
            fields = line.split(b"\t")
            row = [int(field or 0) for field in fields[: 1 + CRITEO_DENSE]]
            row += [int(field or b"0", 16) for field in fields[1 + CRITEO_DENSE :]]
            row += [0] * (FIELDS - len(row))
            rows.append(row)
        table = np.array(rows, np.int64)
        return table[:, 0].astype(np.float32), table[:, 1 : 1 + CRITEO_DENSE], table[:, 1 + CRITEO_DENSE :]

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
