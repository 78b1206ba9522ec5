"""What every reader and generator yields, and how it is cut and joined."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator

_NOTHING, _NO_WEIGHTS = torch.empty(0, dtype=torch.int64), torch.empty(0)


@dataclass(frozen=True)
class Batch:
    """One global batch of B samples.

    Bag b of table t holds the rows `indices[t][offsets[t][b]:offsets[t][b + 1]]`.
    """

    first: int  # number of the first sample in the run
    dense: Tensor  # float32 [B, D]
    indices: tuple[Tensor, ...]  # per table: int64 [number of lookups]
    offsets: tuple[Tensor, ...]  # per table: int64 [B + 1]
    labels: Tensor | None = None  # float32 [B], 0 or 1
    weights: tuple[Tensor, ...] | None = None  # per table: float32 [number of lookups], what each row is multiplied by

    @property
    def size(self) -> int:
        """B, the number of samples."""
        return self.dense.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, each counted once."""
        tensors = [self.dense, *self.indices, *self.offsets, *(self.weights or ())]
        tensors += [] if self.labels is None else [self.labels]
        return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())

    def slice(self, lo: int, hi: int, tables: Collection[int] | None = None) -> Batch:
        """Samples lo to hi (0 <= lo <= hi <= B) as a batch of their own; views where that is possible.

        With `tables` only the bags of those are there.
        """
        if (lo, hi) == (0, self.size):
            return self
        moved: dict[int, tuple[Tensor, int, int]] = {}  # tables often share their offsets
        indices, offsets, weights = [], [], []
        for table, bounds in enumerate(self.offsets):
            if tables is not None and table not in tables:
                indices.append(_NOTHING)
                offsets.append(_NOTHING)
                if self.weights is not None:
                    weights.append(_NO_WEIGHTS)
                continue
            if id(bounds) not in moved:
                start, end = int(bounds[lo]), int(bounds[hi])
                moved[id(bounds)] = (bounds[lo : hi + 1] - start, start, end)
            ends, start, end = moved[id(bounds)]
            indices.append(self.indices[table][start:end])
            offsets.append(ends)
            if self.weights is not None:
                weights.append(self.weights[table][start:end])
        return Batch(
            self.first + lo,
            self.dense[lo:hi],
            tuple(indices),
            tuple(offsets),
            None if self.labels is None else self.labels[lo:hi],
            None if self.weights is None else tuple(weights),
        )


def one_hot_offsets(batch_size: int) -> Tensor:
    """Offsets of bags that hold one row each."""
    return torch.arange(batch_size + 1)


def join(batches: list[Batch]) -> Batch:
    """Batches that follow each other as one; at least one. Labels, and weights, are kept where all have them."""
    if len(batches) == 1:
        return batches[0]
    tables = range(len(batches[0].indices))
    joined: dict[tuple[int, ...], Tensor] = {}

    def ends(table: int) -> Tensor:
        parts = [batch.offsets[table] for batch in batches]
        key = tuple(map(id, parts))
        if key not in joined:
            found, base = [parts[0]], int(parts[0][-1])
            for part in parts[1:]:
                found.append(part[1:] + base)
                base += int(part[-1])
            joined[key] = torch.cat(found)
        return joined[key]

    labels = [batch.labels for batch in batches if batch.labels is not None]
    weights = [batch.weights for batch in batches if batch.weights is not None]
    return Batch(
        batches[0].first,
        torch.cat([batch.dense for batch in batches]),
        tuple(torch.cat([batch.indices[table] for batch in batches]) for table in tables),
        tuple(ends(table) for table in tables),
        torch.cat(labels) if len(labels) == len(batches) else None,
        tuple(torch.cat([one[table] for one in weights]) for table in tables) if len(weights) == len(batches) else None,
    )


def recut(chunks: Iterable[Batch], batch_size: int, num_batches: int, skip: int = 0) -> Iterator[Batch]:
    """Chunks of any sizes as batches of `batch_size` samples, after `skip` samples that are left out.

    The last batch may be shorter; `num_batches` 0: all there are. Holds one batch and one chunk at a time.
    """
    held: list[Batch] = []
    have = made = first = 0
    for whole in chunks:
        left_out = min(skip, whole.size)
        skip -= left_out
        chunk = whole.slice(left_out, whole.size)
        while chunk.size:
            taken = min(batch_size - have, chunk.size)
            held.append(chunk.slice(0, taken))
            chunk = chunk.slice(taken, chunk.size)
            have += taken
            if have < batch_size:
                break
            yield replace(join(held), first=first)
            first, made, held, have = first + have, made + 1, [], 0
            if made == num_batches:  # 0: never
                return
    if held:
        yield replace(join(held), first=first)


class Sized(Protocol):
    """A batch, or what became of one."""

    @property
    def nbytes(self) -> int: ...


Some = TypeVar("Some", bound=Sized)


def preload(batches: Iterable[Some], limit: int = 256 << 20) -> Iterator[Some]:
    """Read up to `limit` bytes of batches now, the rest when it is asked for.

    Small inputs are thus read, and their errors raised, before any timing starts; memory stays bounded for large ones.
    """
    source = iter(batches)
    ready: list[Some] = []
    held = 0
    for batch in source:
        ready.append(batch)
        held += batch.nbytes
        if held >= limit:
            break
    return chain(ready, source)
