"""Which items of all_to_all_single go where: torch's split sizes checked, in the units in which they are posted."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from blsrdma.errors import CountsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def plan(
    output: Tensor, source: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], ranks: int
) -> tuple[Tensor, list[int] | None, Tensor, list[int]]:
    """(what to post, counts or None for equal parts, where to receive, expected counts); counts in the same items.

    Items are rows where rows of both tensors have one shape, else elements. Raises CountsError where split sizes do not
    fit their tensor.
    """
    if source.dim() == 1 == output.dim():
        sent, received = source.numel(), output.numel()
    elif _same_rows(source, output):
        sent, received = source.shape[0], output.shape[0]
    else:
        return _by_elements(output, source, output_splits, input_splits, ranks)
    if len(input_splits) != ranks or sum(input_splits) != sent or min(input_splits) < 0:
        _check(sent, input_splits, ranks, "input")
    if len(output_splits) != ranks or sum(output_splits) != received or min(output_splits) < 0:
        return source, list(input_splits) or None, output, _sizes(received, output_splits, ranks, "output")
    return source, list(input_splits) or None, output, list(output_splits)


def _by_elements(
    output: Tensor, source: Tensor, output_splits: Sequence[int], input_splits: Sequence[int], ranks: int
) -> tuple[Tensor, list[int], Tensor, list[int]]:
    if not source.dim() or not output.dim():
        raise CountsError("all_to_all_single needs tensors with a dimension to split, not scalars")
    counts = _elements(source, _sizes(source.shape[0], input_splits, ranks, "input"))
    expected = _elements(output, _sizes(output.shape[0], output_splits, ranks, "output"))
    return source.reshape(-1), counts, output, expected


def _same_rows(source: Tensor, output: Tensor) -> bool:
    rows = source.shape[1:]  # without any element they would say nothing of their number
    return source.dim() > 0 and rows == output.shape[1:] and 0 not in rows


def _check(rows: int, splits: Sequence[int], ranks: int, which: str) -> None:
    if not splits:
        if rows % ranks:
            raise CountsError(f"{which}: dimension 0 has {rows} rows, which do not divide by {ranks} ranks")
        return
    if len(splits) != ranks:
        raise CountsError(f"{which}_split_sizes has {len(splits)} entries, there are {ranks} ranks")
    if sum(splits) != rows:
        raise CountsError(f"{which}_split_sizes add up to {sum(splits)}, dimension 0 has {rows} rows")
    if min(splits) < 0:
        raise CountsError(f"{which}_split_sizes has a negative entry: {list(splits)}")


def _sizes(rows: int, splits: Sequence[int], ranks: int, which: str) -> list[int]:
    _check(rows, splits, ranks, which)
    return list(splits) if splits else [rows // ranks] * ranks


def _elements(tensor: Tensor, sizes: list[int]) -> list[int]:
    row = math.prod(tensor.shape[1:])
    return [size * row for size in sizes]
