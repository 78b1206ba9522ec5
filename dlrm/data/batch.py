"""What every reader and generator yields."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@dataclass(frozen=True)
class Batch:
    """One global batch of B samples; every rank holds the whole of it, as in the reference.

    Bag b of table t holds the rows `indices[t][offsets[t][b]:offsets[t][b + 1]]`.
    """

    first: int  # number of the first sample in the run
    dense: Tensor  # float32 [B, D]
    indices: tuple[Tensor, ...]  # per table: int64 [number of lookups]
    offsets: tuple[Tensor, ...]  # per table: int64 [B + 1]
    labels: Tensor | None = None  # float32 [B], 0 or 1

    @property
    def size(self) -> int:
        """B, the number of samples."""
        return self.dense.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        tensors = [self.dense, *self.indices, *self.offsets, *([] if self.labels is None else [self.labels])]
        return sum(tensor.nbytes for tensor in tensors)


def one_hot_offsets(batch_size: int) -> Tensor:
    """Offsets of bags that hold one row each."""
    return torch.arange(batch_size + 1)


def preload(batches: Iterable[Batch], limit: int = 256 << 20) -> Iterator[Batch]:
    """Read up to `limit` bytes of batches now, the rest when it is asked for.

    Small inputs are thus read, and their errors raised, before any timing starts; memory stays bounded for large ones.
    """
    source = iter(batches)
    ready: list[Batch] = []
    held = 0
    for batch in source:
        ready.append(batch)
        held += batch.nbytes
        if held >= limit:
            break
    return chain(ready, source)
