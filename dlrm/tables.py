"""Embedding tables of one rank, and their lookup."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from dlrm import bags, kernels
from dlrm.model import draw_table
from dlrm.placement import Piece

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from dlrm.data.batch import Batch
    from dlrm.kernels import Kernel
    from dlrm.shape import ModelShape

Pooling = Literal["sum", "mean"]


class Tables(nn.Module):
    """What a rank has of the tables, under their global numbers: `emb_l.{k}.weight`, stored as `kernel` does.

    `owned`: tables, or pieces of them. With `seed` None the rows are not drawn but left for `load`.
    """

    def __init__(
        self,
        shape: ModelShape,
        owned: Iterable[int | Piece],
        seed: int | None,
        kernel: Kernel | None = None,
        pooling: Pooling = "sum",
    ) -> None:
        super().__init__()
        self.owned = tuple(Piece(one) if isinstance(one, int) else one for one in owned)
        self.dim = shape.dim
        self.table_rows = shape.table_rows
        self.kernel = kernel or kernels.choose(32)
        self.pooling = pooling
        self.emb_l = nn.ModuleDict()
        sizes = [len(self._rows(piece)) for piece in self.owned]
        self._all = self.kernel.empty(sum(sizes), self.dim)  # one table after another
        self._weights = torch.split(self._all, sizes) if sizes else ()
        self._starts = torch.tensor([0, *accumulate(sizes)][:-1], dtype=torch.int64)
        self._whole = all(piece.rows is None for piece in self.owned)
        self._offsets = torch.empty(0, dtype=torch.int64)
        for piece, stored in zip(self.owned, self._weights, strict=True):
            if seed is not None:
                self._draw(piece, seed, stored)
            holder = nn.Module()
            holder.weight = nn.Parameter(stored, requires_grad=False)
            self.emb_l[str(piece.table)] = holder

    @property
    def tables(self) -> tuple[int, ...]:
        """The tables of which there is something here, in the order of lookups."""
        return tuple(piece.table for piece in self.owned)

    def stored(self) -> tuple[Tensor, ...]:
        """The rows of each of `owned`, as the kernel stores them, [rows, width]."""
        return self._weights

    def nbytes(self) -> int:
        """Bytes of all rows as stored."""
        return self._all.nbytes

    def row_bytes(self) -> int:
        """Bytes of one sample's pooled vectors."""
        return len(self.owned) * self.dim * 4

    def load(self, state: dict[str, Tensor]) -> None:
        """Copy the rows out of a checked state (see `checkpoint`), converting where they are stored otherwise."""
        for piece, stored in zip(self.owned, self._weights, strict=True):
            source = state[f"emb_l.{piece.table}.weight"]
            rows = self._rows(piece)
            source = source[rows.start : rows.stop]
            if source.dtype == torch.uint8:
                format_ = kernels.of_rows(source, self.dim)
                if format_ is not None and format_.name == self.kernel.name:
                    stored.copy_(source)
                    continue
                assert format_ is not None  # checked with the state
                for start in range(0, len(rows), kernels.ENCODE_ROWS):
                    part = slice(start, start + kernels.ENCODE_ROWS)
                    stored[part] = self.kernel.encode(format_.decode(source[part], self.dim))
            else:
                self.kernel.store(source, stored)

    def lookup(self, batch: Batch, memory: Callable[[], Tensor]) -> Tensor:
        """Pool the bags of the whole batch, float32 [B, T, dim]: in memory of the kernel's, or in what `memory` gives.

        Samples are outermost, so what goes to one rank is contiguous. A bag is summed in index order, whatever the
        batch size or the number of tables; of a piece only the rows that are here count, and mean pooling of it is
        left to the receiver, who has all lengths. Indices must have been checked (see `bags`). `memory` is called
        where it is needed, for a float32 vector of at least B * T * dim elements.
        """
        if self._whole and self._one_row_each(batch):
            return self._rows_of(batch)
        pooled = memory()[: batch.size * len(self.owned) * self.dim].view(batch.size, len(self.owned), self.dim)
        if not batch.size:
            return pooled
        for position, (piece, weight) in enumerate(zip(self.owned, self._weights, strict=True)):
            indices, offsets = batch.indices[piece.table], batch.offsets[piece.table]
            scales = None if batch.weights is None else batch.weights[piece.table]
            if piece.rows is not None:
                indices, offsets, scales = bags.within(indices, offsets, scales, piece.rows)
            pooled[:, position] = self.kernel.pool(weight, indices, offsets, scales)
            if self.pooling == "mean" and piece.rows is None:
                pooled[:, position] /= lengths(batch, piece.table)
        return pooled

    def lookup_all(self, batch: Batch) -> Tensor:
        """`lookup` into memory of its own."""
        return self.lookup(batch, lambda: torch.empty(batch.size * len(self.owned) * self.dim))

    def _one_row_each(self, batch: Batch) -> bool:
        """Whether there are bags, and each has one row."""
        if not batch.size or not self.owned:
            return False
        seen: set[int] = set()  # tables often share their offsets
        for table in self.tables:
            offsets = batch.offsets[table]
            if len(batch.indices[table]) != batch.size:
                return False
            if id(offsets) not in seen and not torch.equal(offsets, self._up_to(batch.size)):
                return False
            seen.add(id(offsets))
        return True

    def _up_to(self, number: int) -> Tensor:
        """0, 1, ..., number."""
        if len(self._offsets) <= number:
            self._offsets = torch.arange(number + 1)
        return self._offsets[: number + 1]

    def _rows_of(self, batch: Batch) -> Tensor:
        """Bags of one row: all tables at once, so that every vector is written just once, where it belongs."""
        rows = torch.stack([batch.indices[table] for table in self.tables], dim=1).add_(self._starts).view(-1)
        scales = None
        if batch.weights is not None:
            scales = torch.stack([batch.weights[table] for table in self.tables], dim=1).view(-1)
        pooled = self.kernel.pool(self._all, rows, self._up_to(len(rows)), scales)
        return pooled.float().view(batch.size, len(self.owned), self.dim)

    def _rows(self, piece: Piece) -> range:
        return range(self.table_rows[piece.table]) if piece.rows is None else piece.rows

    def _draw(self, piece: Piece, seed: int, stored: Tensor) -> None:
        whole = self.kernel.bits == 32 and piece.rows is None
        weight = stored if whole else torch.empty(self.table_rows[piece.table], self.dim)
        draw_table(seed, piece.table, weight)
        if not whole:
            rows = self._rows(piece)
            self.kernel.store(weight[rows.start : rows.stop], stored)


def lengths(batch: Batch, table: int) -> Tensor:
    """What a sum becomes a mean by: rows of each bag, at least 1; float32 [B, 1]."""
    return batch.offsets[table].diff().clamp(min=1).to(torch.float32).unsqueeze(1)
