"""Bags of row numbers: checked before anything is done with them, and cut to the rows that a rank has."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from dlrm.errors import BadIndex

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from dlrm.data.batch import Batch


def check(batch: Batch, table_rows: tuple[int, ...], tables: Iterable[int]) -> None:
    """Raise BadIndex, naming table, position, value and size, where a bag of one of `tables` cannot be looked up."""
    ends: dict[int, int] = {}  # offsets that several tables share are looked at once
    for table in tables:
        indices, offsets = batch.indices[table], batch.offsets[table]
        if indices.dtype != torch.int64 or offsets.dtype != torch.int64:
            wrong = "indices" if indices.dtype != torch.int64 else "offsets"
            dtype = indices.dtype if wrong == "indices" else offsets.dtype
            raise BadIndex(
                f"table {table}: {wrong} are {dtype}, wanted torch.int64", table=table, size=table_rows[table]
            )
        if id(offsets) not in ends:
            ends[id(offsets)] = _check_offsets(table, offsets, batch.size, table_rows[table])
        if ends[id(offsets)] != len(indices):
            raise BadIndex(
                f"table {table}: offsets end at {ends[id(offsets)]}, but there are {len(indices)} indices",
                table=table, position=batch.size, value=ends[id(offsets)], size=table_rows[table],
            )  # fmt: skip
        if batch.weights is not None:
            _check_weights(table, batch.weights[table], len(indices), table_rows[table])
        if not len(indices) or indices.numpy().view(np.uint64).max() < table_rows[table]:  # negative ones are huge
            continue
        position = int(((indices < 0) | (indices >= table_rows[table])).nonzero()[0])
        value = int(indices[position])
        sample = batch.first + int(torch.searchsorted(offsets, position, right=True)) - 1
        raise BadIndex(
            f"table {table}: index {value} at position {position} (sample {sample}) is not a row of a table of "
            f"{table_rows[table]} rows",
            table=table, position=position, value=value, size=table_rows[table],
        )  # fmt: skip


def _check_offsets(table: int, offsets: Tensor, samples: int, size: int) -> int:
    """The last one of good offsets. In NumPy, whose calls cost a third of torch's."""
    if offsets.shape != (samples + 1,):
        raise BadIndex(
            f"table {table}: offsets have shape {list(offsets.shape)}, wanted [{samples + 1}] for {samples} samples",
            table=table, size=size,
        )  # fmt: skip
    ends = offsets.numpy()
    if ends[0] != 0:
        raise BadIndex(
            f"table {table}: offset {ends[0]} at position 0, wanted 0",
            table=table, position=0, value=int(ends[0]), size=size,
        )  # fmt: skip
    falls = ends[1:] < ends[:-1]
    if falls.any():
        position = int(falls.argmax()) + 1
        raise BadIndex(
            f"table {table}: offset {ends[position]} at position {position} is less than the one before it, "
            f"{ends[position - 1]}",
            table=table, position=position, value=int(ends[position]), size=size,
        )  # fmt: skip
    return int(ends[-1])


def _check_weights(table: int, weights: Tensor, lookups: int, size: int) -> None:
    if weights.dtype != torch.float32 or weights.shape != (lookups,):
        raise BadIndex(
            f"table {table}: weights are {weights.dtype} {list(weights.shape)}, wanted torch.float32 [{lookups}]",
            table=table, size=size,
        )  # fmt: skip


def within(
    indices: Tensor, offsets: Tensor, weights: Tensor | None, rows: range
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The bags without what lies outside `rows`, renumbered from its start; order kept."""
    inside = (indices >= rows.start) & (indices < rows.stop)
    before = torch.zeros(len(indices) + 1, dtype=torch.int64)
    torch.cumsum(inside, 0, out=before[1:])
    return indices[inside] - rows.start, before[offsets], None if weights is None else weights[inside]
