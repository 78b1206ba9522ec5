"""Random tables and bags, and what torch makes of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from blsrdma.lookup_tables import Bags, RowFormat, Rows

DIMS = (1, 2, 7, 16, 64, 100, 128)
FORMATS: tuple[RowFormat, ...] = ("fp32", "fp16", "int8", "int4")


def rows(table: int, count: int, dim: int, format_: RowFormat) -> Rows:
    """The rows of a table, the same on every rank."""
    weight = torch.randn(count, dim, generator=torch.Generator().manual_seed(table))
    if format_ == "fp16":
        return Rows(weight.half())
    if format_ == "int8":
        return Rows(torch.ops.quantized.embedding_bag_byte_prepack(weight), "int8", dim)
    if format_ == "int4":
        return Rows(torch.ops.quantized.embedding_bag_4bit_prepack(weight), "int4", dim)
    return Rows(weight)


def pooled(table: Rows, bags: Bags, mean: bool = False) -> Tensor:
    """What torch's operators give: float32 [bags, dim]."""
    data, indices, offsets, weights = table.data, bags.indices, bags.offsets, bags.weights
    assert isinstance(data, Tensor)
    assert isinstance(offsets, Tensor)
    if table.format in ("int8", "int4"):
        word = "byte" if table.format == "int8" else "4bit"
        bag: Any = getattr(torch.ops.quantized, f"embedding_bag_{word}_rowwise_offsets")
        out = bag(data, indices, offsets, False, 0, False, weights, None, True)
    else:
        scales = None if weights is None else weights.to(data.dtype)
        out = functional.embedding_bag(
            indices, data, offsets, mode="sum", include_last_offset=True, per_sample_weights=scales
        ).float()
    return out / offsets.diff().clamp(min=1).to(torch.float32).unsqueeze(1) if mean else out


def draw(
    rng: np.random.Generator, table: int, count: int, bags: int, longest: int, weighted: bool | None = None
) -> Bags:
    """Bags of 0 to `longest` rows."""
    offsets = np.concatenate([[0], np.cumsum(rng.integers(0, longest + 1, bags))])
    indices = rng.integers(0, count, int(offsets[-1]))
    weights = (
        rng.standard_normal(len(indices), np.float32) if weighted or (weighted is None and rng.random() < 0.5) else None
    )
    return Bags(
        table,
        torch.from_numpy(indices),
        torch.from_numpy(offsets),
        None if weights is None else torch.from_numpy(weights),
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN and the sign of 0 included."""
    return a.shape == b.shape and torch.equal(a.contiguous().view(torch.int32), b.contiguous().view(torch.int32))
