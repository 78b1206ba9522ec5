"""The parameters of the model, by seed, and its dense half (bottom MLP, interaction, top MLP).

Formulas, initial distributions and names are those of the reference DLRM (see `shape`). Every parameter has a seed of
its own, so whichever rank builds a table builds the same one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from dlrm.shape import ModelShape

DenseKernel = Literal["torch", "onednn"]

_TABLE, _BOTTOM, _TOP = 0, 1, 2  # second word of a parameter's seed


def seeded(seed: int, kind: int, number: int) -> np.random.Generator:
    """The generator for one parameter."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, 0x313E1, kind, number])))


def draw_table(seed: int, table: int, out: Tensor) -> None:
    """Initial weight of a table into `out`, float32 [rows, dim]: uniform in +-sqrt(1 / rows), as in the reference."""
    draws = out.numpy()
    bound = np.float32(np.sqrt(1.0 / len(draws)))
    seeded(seed, _TABLE, table).random(dtype=np.float32, out=draws)
    draws *= 2 * bound
    draws -= bound


class Dense(nn.Module):
    """What every rank holds whole: bottom MLP, interaction, top MLP; fp32, drawn from `seed`.

    The methods are the formulas, and can be differentiated (see `fit`); `dense` evaluates them in memory of its own.
    """

    def __init__(self, shape: ModelShape, seed: int) -> None:
        super().__init__()
        self.shape = shape
        self.bot_l = _mlp(shape.bottom, seed, _BOTTOM, nn.ReLU())
        self.top_l = _mlp(shape.top, seed, _TOP, nn.Sigmoid())
        vectors = shape.num_tables + 1
        offset = 1 if shape.itself else 0
        pairs = [i * vectors + j for i in range(vectors) for j in range(i + offset)]  # the reference's order
        self.pairs = torch.tensor(pairs, dtype=torch.int64)
        self.kernel: DenseKernel = "torch"  # who multiplies the MLPs where `dense` evaluates them
        self.loss_threshold = 0.0  # in between 0 and 1: probabilities are kept that far from 0 and from 1

    def bottom(self, dense: Tensor) -> Tensor:
        """Bottom MLP: [B, D] -> [B, dim]."""
        output: Tensor = self.bot_l(dense)
        return output

    def interact(self, vectors: Tensor) -> Tensor:
        """Interaction: [B, 1 + T, dim], the bottom MLP's output first -> [B, width]."""
        batch = vectors.shape[0]
        if self.shape.interaction == "cat":
            return vectors.reshape(batch, -1)
        products = torch.bmm(vectors, vectors.transpose(1, 2)).view(batch, -1)
        return torch.cat([vectors[:, 0], products.index_select(1, self.pairs)], dim=1)

    def top(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Interaction and top MLP: [B, 1 + T, dim] -> logits [B] (before the sigmoid) and click probabilities [B]."""
        value = self.interact(vectors)
        logits = value
        for layer in self.top_l:
            logits, value = value, layer(value)
        if 0 < self.loss_threshold < 1:
            value = value.clamp(self.loss_threshold, 1 - self.loss_threshold)
        return logits.view(-1), value.view(-1)


def _mlp(widths: tuple[int, ...], seed: int, kind: int, last: nn.Module) -> nn.Sequential:
    """Linear layers, ReLU between them, `last` at the end; drawn as in the reference (normal, by fan in and out)."""
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(pairwise(widths)):
        random = seeded(seed, kind, number)
        linear = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")
        weight = random.standard_normal((outputs, inputs)) * np.sqrt(2.0 / (inputs + outputs))
        bias = random.standard_normal(outputs) * np.sqrt(1.0 / outputs)
        with torch.no_grad():
            linear.weight.copy_(torch.from_numpy(weight))
            linear.bias.copy_(torch.from_numpy(bias))
        layers += [linear, nn.ReLU() if number < len(widths) - 2 else last]
    return nn.Sequential(*layers).eval().requires_grad_(False)
