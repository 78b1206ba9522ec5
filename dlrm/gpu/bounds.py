"""What --verify compares logits on a GPU with: the model in float64, and how far its evaluation in fp32 may be from it.

No tolerance that was tuned to a run: a forward error analysis that treats roundings as independent (Higham and Mary, A
new approach to probabilistic rounding error analysis, 2019). Each of the n roundings of a sum is off by a random part
of the unit of the partial sum it rounds, whose size is that of the sum, of its bias, or of a random walk of its
products; errors that came in are carried along by the squares of the weights. DEVIATIONS standard deviations are
allowed. The worst case would be of no use: it grows by sums of absolute weights, tenfold and more with each layer.
Pooled vectors come in without an error: their bits are compared first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dlrm.model import Dense

UNIT = 2.0**-24  # of fp32, rounded to nearest
TF32_UNIT = 2.0**-11
TF32_SUM_UNIT = 2.0**-23  # tensor cores cut off, always to the same side
DEVIATIONS = 16.0
SIGMOID = 2.0**-20  # what an fp32 sigmoid is off by, at most
TINY = 1e-30  # of a variance: what underflow can have lost


class Reference:
    """A model in float64. Values go through it with the variances of their errors in fp32."""

    def __init__(self, model: Dense, tf32: bool) -> None:
        self._shape, self._pairs, self._threshold = model.shape, model.pairs, model.loss_threshold
        self._tf32 = tf32
        self._bottom, self._top = ([(layer.weight.double(), layer.bias.double()) for layer in mlp
                                    if isinstance(layer, nn.Linear)] for mlp in (model.bot_l, model.top_l))  # fmt: skip

    def logits(self, dense: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B] of float32 features [B, D] and pooled vectors [B, T, dim], and bounds of their errors [B]."""
        value, variance = dense.double(), torch.zeros(dense.shape, dtype=torch.float64)
        for weight, bias in self._bottom:
            value, variance = self._linear(value, variance, weight, bias)
            value = value.relu()
        vectors = torch.cat([value.unsqueeze(1), pooled.double()], dim=1)
        variances = torch.zeros_like(vectors)
        variances[:, 0] = variance
        value, variance = self._interact(vectors, variances)
        for number, (weight, bias) in enumerate(self._top):
            value, variance = self._linear(value if number == 0 else value.relu(), variance, weight, bias)
        return value.view(-1), DEVIATIONS * variance.view(-1).sqrt()

    def _linear(self, value: Tensor, variance: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        squares, terms, out = (weight * weight).t(), value.shape[1] + 1, value @ weight.t() + bias
        walk = (value * value) @ squares
        sizes = walk + out * out + bias * bias
        added = terms * UNIT**2 * sizes
        if self._tf32:
            added = 2 * TF32_UNIT**2 * walk + (terms * TF32_SUM_UNIT) ** 2 * sizes
        return out, variance @ squares + added + TINY

    def _interact(self, vectors: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
        batch = len(vectors)
        if self._shape.interaction == "cat":
            return vectors.reshape(batch, -1), variances.reshape(batch, -1)
        turned, squares = vectors.transpose(1, 2), vectors * vectors
        products = torch.bmm(vectors, turned)
        walk = torch.bmm(squares, squares.transpose(1, 2))
        carried = torch.bmm(squares + variances, (squares + variances).transpose(1, 2)) - walk
        # (twice what is carried: in a product of a vector with itself both errors are one)
        off = 2 * carried + self._shape.dim * UNIT**2 * (walk + products * products) + TINY
        found = [torch.cat([of[:, 0], pairs.view(batch, -1).index_select(1, self._pairs)], dim=1)
                 for of, pairs in ((vectors, products), (variances, off))]  # fmt: skip
        return found[0], found[1]

    def probabilities(self, logits: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities [B], and bounds of their errors."""
        value = torch.sigmoid(logits)
        if 0 < self._threshold < 1:
            value = value.clamp(self._threshold, 1 - self._threshold)
        return value, bounds / 4 + SIGMOID


def first_outside(
    what: str, got: NDArray[np.float32], wanted: Tensor, bounds: Tensor, first: int
) -> tuple[str | None, float]:
    """Where values [B] are further from float64's than their bounds, in words, or None; the largest error in bounds."""
    shares = np.abs(got.astype(np.float64) - wanted.numpy()) / bounds.numpy()
    outside = np.flatnonzero(~(shares <= 1))
    largest = float(shares.max(initial=0.0))
    if not len(outside):
        return None, largest
    at = int(outside[0])
    return (
        f"{what} are outside their bound first at sample {first + at} (position {at} of its batch): {got[at]!r}, "
        f"wanted {float(wanted[at])!r} +- {float(bounds[at]):.3g}"
    ), largest
