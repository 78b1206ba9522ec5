"""What --verify allows on a GPU: every fp32 evaluation with room to spare, and none that multiplies in TF32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from dlrm.gpu.bounds import Reference, first_outside
from dlrm.model import Dense
from dlrm.shape import ModelShape, interaction_width

if TYPE_CHECKING:
    from collections.abc import Sequence

SAMPLES, TABLES = 64, 10


def model(bottom: tuple[int, ...], top: tuple[int, ...], op: str, itself: bool) -> Dense:
    width = interaction_width(TABLES, bottom[-1], op, itself)
    return Dense(ModelShape((100,) * TABLES, bottom[-1], bottom, (width, *top), op, itself), 7)  # type: ignore[arg-type]


def mlp(value: torch.Tensor, layers: Sequence[nn.Module], rectified: bool, bits: int) -> torch.Tensor:
    """In float32, but for factors of products, which have so many bits."""
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    for number, layer in enumerate(linear):
        factors = rounded(value, bits).double(), rounded(layer.weight, bits).double()
        value = (factors[0] @ factors[1].t() + layer.bias.double()).float()
        if number < len(linear) - 1 or rectified:
            value = value.relu()
    return value


def rounded(value: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 24:
        return value
    cut = 1 << 24 - bits
    return ((value.contiguous().view(torch.int32) + cut // 2) & -cut).view(torch.float32)


def logits(dense: Dense, features: torch.Tensor, pooled: torch.Tensor, bits: int) -> torch.Tensor:
    bottom = mlp(features, list(dense.bot_l), True, bits)
    return mlp(dense.interact(torch.cat([bottom.unsqueeze(1), pooled], 1)), list(dense.top_l), False, bits).view(-1)


@pytest.mark.parametrize(
    ("bottom", "top", "op", "itself"),
    [
        ((13, 512, 256, 64), (512, 256, 1), "dot", False),
        ((13, 512, 256, 64), (1024, 1024, 512, 256, 1), "dot", True),
        ((5, 16, 8), (16, 1), "dot", False),
        ((13, 64, 16), (64, 1), "cat", False),
    ],
)
def test_bounds(bottom: tuple[int, ...], top: tuple[int, ...], op: str, itself: bool) -> None:
    dense = model(bottom, top, op, itself)
    torch.manual_seed(1)
    features = torch.log(torch.randint(1, 1000, (SAMPLES, bottom[0])).float())
    pooled = torch.empty(SAMPLES, TABLES, bottom[-1]).uniform_(-0.3, 0.3)
    fp32, tf32 = logits(dense, features, pooled, 24), logits(dense, features, pooled, 11)
    plain = dense.top(torch.cat([dense.bottom(features).unsqueeze(1), pooled], 1))[0]
    wanted, bounds = Reference(dense, False).logits(features, pooled)
    wide = Reference(dense, True).logits(features, pooled)[1]
    for found in (fp32, plain):
        text, share = first_outside("logits", found.numpy(), wanted, bounds, 0)
        assert text is None
        assert 0 < share < 0.2
    text, share = first_outside("logits", tf32.numpy(), wanted, bounds, 900)
    assert share > 1
    assert text is not None
    assert "logits are outside their bound first at sample 9" in text
    assert first_outside("logits", tf32.numpy(), wanted, wide, 0)[1] < 0.2
    assert first_outside("logits", (plain * float("nan")).numpy(), wanted, bounds, 0)[0] is not None
