"""What --verify compares logits on a GPU with: the model in float64, and how far its evaluation in fp32 may be from it.

The bound is not a tolerance that was tuned. It is the running bound of a forward error analysis (Higham, Accuracy and
Stability of Numerical Algorithms, section 3): sums of n products, in whatever order and with whatever is fused, are off
by at most gamma(n + 1) of the sum of their absolute values, and errors that came in are carried along with absolute
values of the weights. It holds for every correct fp32 evaluation, and for TF32 with products of factors of 11 bits.
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

UNIT = 2.0**-24  # of fp32
TF32_PRODUCT = 2.0**-10 + 2.0**-22  # of two factors that were rounded to 11 bits
SIGMOID = 2.0**-20  # what an fp32 sigmoid is off by, at most
TINY = 1e-30  # what underflow can have lost


def gamma(roundings: int, unit: float = UNIT) -> float:
    """What so many roundings, one after another, change at most, relatively."""
    return roundings * unit / (1 - roundings * unit)


class Reference:
    """A model in float64."""

    def __init__(self, model: Dense, tf32: bool) -> None:
        self._shape, self._pairs, self._threshold = model.shape, model.pairs, model.loss_threshold
        self._tf32 = tf32
        self._bottom, self._top = ([(layer.weight.double(), layer.bias.double()) for layer in mlp
                                    if isinstance(layer, nn.Linear)] for mlp in (model.bot_l, model.top_l))  # fmt: skip

    def logits(self, dense: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B] of float32 features [B, D] and pooled vectors [B, T, dim], and bounds of their errors [B]."""
        value = dense.double(), torch.zeros(dense.shape, dtype=torch.float64)
        for weights in self._bottom:
            value = _rectified(*self._linear(*value, *weights))
        vectors = torch.cat([value[0].unsqueeze(1), pooled.double()], dim=1)
        errors = torch.zeros_like(vectors)
        errors[:, 0] = value[1]
        value = self._interact(vectors, errors)
        for number, weights in enumerate(self._top):
            value = self._linear(*(value if number == 0 else _rectified(*value)), *weights)
        return value[0].view(-1), value[1].view(-1)

    def _linear(self, value: Tensor, error: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        magnitudes, inputs = weight.abs().t(), value.shape[1]
        each = gamma(inputs + 1)
        if self._tf32:  # whose sums may be cut off in place of being rounded
            each = TF32_PRODUCT + gamma(inputs + 2, 2 * UNIT)
        added = each * ((value.abs() + error) @ magnitudes + bias.abs()) + TINY
        return value @ weight.t() + bias, error @ magnitudes + added

    def _interact(self, vectors: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
        batch = len(vectors)
        if self._shape.interaction == "cat":
            return vectors.reshape(batch, -1), errors.reshape(batch, -1)
        sizes = vectors.abs()
        products = torch.bmm(vectors, vectors.transpose(1, 2)).view(batch, -1)
        most = torch.bmm(sizes + errors, (sizes + errors).transpose(1, 2))
        carried = most - torch.bmm(sizes, sizes.transpose(1, 2))
        off = (carried + gamma(self._shape.dim + 1) * most + TINY).view(batch, -1)
        found = (torch.cat([of[:, 0], pairs.index_select(1, self._pairs)], dim=1)
                 for of, pairs in ((vectors, products), (errors, off)))  # fmt: skip
        return next(found), next(found)

    def probabilities(self, logits: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities [B], and bounds of their errors."""
        value = torch.sigmoid(logits)
        if 0 < self._threshold < 1:
            value = value.clamp(self._threshold, 1 - self._threshold)
        return value, bounds / 4 + SIGMOID


def _rectified(value: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    return value.relu(), error


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
