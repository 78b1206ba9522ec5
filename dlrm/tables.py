"""Embedding tables of one rank, and their lookup."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from dlrm import bags, kernels
from dlrm.model import table_weight
from dlrm.placement import Piece

if TYPE_CHECKING:
    from collections.abc import Iterable

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
        self._weights: list[Tensor] = []
        for piece in self.owned:
            rows = self._rows(piece)
            holder = nn.Module()
            if seed is None:
                stored = self.kernel.empty(len(rows), self.dim)
            else:
                stored = self._stored(table_weight(seed, piece.table, shape.table_rows[piece.table], self.dim), rows)
            holder.weight = nn.Parameter(stored, requires_grad=False)
            self.emb_l[str(piece.table)] = holder
            self._weights.append(stored)

    @property
    def tables(self) -> tuple[int, ...]:
        """The tables of which there is something here, in the order of lookups."""
        return tuple(piece.table for piece in self.owned)

    def nbytes(self) -> int:
        """Bytes of all rows as stored."""
        return sum(weight.nbytes for weight in self._weights)

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

    def lookup(self, batch: Batch, out: Tensor) -> Tensor:
        """Pool the bags of the whole batch into `out`, float32 of at least B * T * dim elements; [B, T, dim] of it.

        Samples are outermost, so what goes to one rank is contiguous. A bag is summed in index order, whatever the
        batch size or the number of tables; of a piece only the rows that are here count, and mean pooling of it is
        left to the receiver, who has all lengths. Indices must have been checked (see `bags`).
        """
        size = batch.size * len(self.owned) * self.dim
        pooled = out[:size].view(batch.size, len(self.owned), self.dim)
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
        return self.lookup(batch, torch.empty(batch.size * len(self.owned) * self.dim))

    def _rows(self, piece: Piece) -> range:
        return range(self.table_rows[piece.table]) if piece.rows is None else piece.rows

    def _stored(self, weight: Tensor, rows: range) -> Tensor:
        if self.kernel.bits == 32 and len(rows) == len(weight):
            return weight
        stored = self.kernel.empty(len(rows), self.dim)
        self.kernel.store(weight[rows.start : rows.stop], stored)
        return stored


def lengths(batch: Batch, table: int) -> Tensor:
    """What a sum becomes a mean by: rows of each bag, at least 1; float32 [B, 1]."""
    return batch.offsets[table].diff().clamp(min=1).to(torch.float32).unsqueeze(1)
