"""Batches from plain arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dlrm.data.batch import Batch, one_hot_offsets

if TYPE_CHECKING:
    from numpy.typing import NDArray


def one_hot(
    dense: NDArray[np.float32], rows: NDArray[np.int64], labels: NDArray[Any], max_ind_range: int = -1
) -> Batch:
    """Bags of one row each: dense [B, D], rows [T, B], labels [B]; rows modulo `max_ind_range` where it is above 0."""
    if max_ind_range > 0:
        rows = rows % max_ind_range
    offsets = one_hot_offsets(rows.shape[1])
    columns = tuple(torch.from_numpy(np.ascontiguousarray(rows)))
    flat = torch.from_numpy(np.asarray(labels).reshape(-1).astype(np.float32))
    return Batch(0, torch.from_numpy(np.array(dense)), columns, (offsets,) * len(columns), flat)


def fixed_hot(
    dense: NDArray[np.float32], rows: list[NDArray[Any]], labels: NDArray[Any], max_ind_range: int = -1
) -> Batch:
    """Bags of as many rows as each table's array [B, hotness] has columns."""
    indices, offsets = [], []
    for table in rows:
        own = table.astype(np.int64) % max_ind_range if max_ind_range > 0 else table.astype(np.int64)
        indices.append(torch.from_numpy(np.ascontiguousarray(own).reshape(-1)))
        offsets.append(one_hot_offsets(len(own)) * own.shape[1])
    flat = torch.from_numpy(np.asarray(labels).reshape(-1).astype(np.float32))
    return Batch(0, torch.from_numpy(np.array(dense)), tuple(indices), tuple(offsets), flat)
