"""A DLRM as anybody would write it in torch, in one process: the yardstick of `bench.inference`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dlrm.data.batch import Batch
    from dlrm.model import Dense
    from dlrm.tables import Tables


class PlainDlrm(nn.Module):
    """Modules of torch for every part, over the parameters of ours, which must hold all tables as floats."""

    def __init__(self, tables: Tables, dense: Dense) -> None:
        super().__init__()
        self.bags = nn.ModuleList(
            nn.EmbeddingBag.from_pretrained(
                tables.get_parameter(f"emb_l.{table}.weight"), mode="sum", include_last_offset=True
            )
            for table in tables.tables
        )
        self.bottom, self.top = dense.bot_l, dense.top_l
        count = 1 + len(self.bags)
        self.rows, self.columns = torch.tril_indices(count, count, -1)

    def forward(self, batch: Batch) -> Tensor:
        """Click probabilities [B]."""
        dense = self.bottom(batch.dense)
        pooled = [bag(*bags) for bag, *bags in zip(self.bags, batch.indices, batch.offsets, strict=True)]
        vectors = torch.stack([dense, *pooled], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))
        clicks: Tensor = self.top(torch.cat([dense, products[:, self.rows, self.columns]], dim=1))
        return clicks.view(-1)
