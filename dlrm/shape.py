"""The shape of a model: which parameters it has, and how wide its interaction is.

Names are those of the reference DLRM (facebookresearch/dlrm, dlrm_s_pytorch.py): `emb_l.{k}.weight` [rows of k, dim],
`bot_l.{i}.weight` / `.bias` and `top_l.{i}.weight` / `.bias` with i counting the activations too (0, 2, 4, ...).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal


@dataclass(frozen=True)
class ModelShape:
    """What decides which parameters a model has. `top` includes its first width (see `interaction_width`)."""

    table_rows: tuple[int, ...]
    dim: int
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    interaction: Literal["dot", "cat"] = "dot"
    itself: bool = False

    @property
    def num_tables(self) -> int:
        """T, the number of embedding tables."""
        return len(self.table_rows)

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of all parameters of the whole model."""
        shapes: dict[str, tuple[int, ...]] = {
            f"emb_l.{table}.weight": (rows, self.dim) for table, rows in enumerate(self.table_rows)
        }
        for name, widths in (("bot_l", self.bottom), ("top_l", self.top)):
            for layer, (inputs, outputs) in enumerate(pairwise(widths)):
                shapes[f"{name}.{2 * layer}.weight"] = (outputs, inputs)
                shapes[f"{name}.{2 * layer}.bias"] = (outputs,)
        return shapes


def interaction_width(num_tables: int, dim: int, interaction: str, itself: bool) -> int:
    """Width of the interaction's output, which is the first width of the top MLP.

    dot: the bottom MLP's output, and a product for each pair of the T + 1 vectors (`itself`: each with itself, too);
    cat: all T + 1 vectors, one after another.
    """
    vectors = num_tables + 1
    if interaction == "cat":
        return vectors * dim
    return dim + (vectors * (vectors + 1) if itself else vectors * (vectors - 1)) // 2
