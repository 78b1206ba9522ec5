"""Embedding tables of one rank, and their lookup with sum pooling."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from dlrm.model import table_weight

if TYPE_CHECKING:
    from dlrm.data.batch import Batch
    from dlrm.shape import ModelShape


class Tables(nn.Module):
    """The tables `owned`, under their global numbers: `emb_l.{k}.weight`, float32 [rows, dim], drawn from `seed`."""

    def __init__(self, shape: ModelShape, owned: range, seed: int) -> None:
        super().__init__()
        self.owned = owned
        self.dim = shape.dim
        self.emb_l = nn.ModuleDict(
            {
                str(table): nn.EmbeddingBag(
                    shape.table_rows[table],
                    shape.dim,
                    mode="sum",
                    include_last_offset=True,
                    _weight=table_weight(seed, table, shape.table_rows[table], shape.dim),
                )
                for table in owned
            }
        ).requires_grad_(False)
        self._weights = [bag.weight for bag in self.emb_l.values() if isinstance(bag, nn.EmbeddingBag)]

    def row_bytes(self) -> int:
        """Bytes of one sample's pooled vectors."""
        return len(self.owned) * self.dim * 4

    def lookup(self, batch: Batch, out: Tensor) -> Tensor:
        """Pool the bags of the whole batch into `out`, float32 of at least B * T * dim elements; [B, T, dim] of it.

        Samples are outermost, so what goes to one rank is contiguous. A bag is summed in index order by torch's plain
        kernel, whatever the batch size or the number of tables.
        """
        size = batch.size * len(self.owned) * self.dim
        pooled = out[:size].view(batch.size, len(self.owned), self.dim)
        for position, table in enumerate(self.owned):
            pooled[:, position] = functional.embedding_bag(
                batch.indices[table],
                self._weights[position],
                batch.offsets[table],
                mode="sum",
                include_last_offset=True,
            )
        return pooled

    def lookup_all(self, batch: Batch) -> Tensor:
        """`lookup` into memory of its own."""
        return self.lookup(batch, torch.empty(batch.size * len(self.owned) * self.dim))
