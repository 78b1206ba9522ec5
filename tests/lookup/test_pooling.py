"""The kernel by itself: torch's bits in every row format, whatever the instructions, however a bag is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blsrdma.lookup_tables import FORMATS, Bags, Rows, describe, describe_bags
from blsrdma.ucx import native
from tests.lookup.bags import DIMS, draw, pooled, rows, same_bits

INSTRUCTIONS = sorted({"baseline", native.pool_instructions()})


def ours(table: Rows, bags: Bags, mean: bool, instructions: str) -> torch.Tensor:
    facts, data = describe(bags.table, 0, table)
    indices, count, offsets, number, weights = describe_bags(bags)
    out = torch.full((number, facts.dim), torch.nan)
    part = (0, mean, indices, count, offsets, number, weights, out.data_ptr(), facts.dim)
    native.pool_with(instructions, FORMATS.index(facts.format), facts.dim, data.data_ptr(), part)
    return out


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
@pytest.mark.parametrize("format_", FORMATS)
def test_torchs_bits(format_: str, instructions: str) -> None:
    """Sums and means, with weights and without. (torch fuses multiplication and addition: so does the kernel.)"""
    rng = np.random.default_rng(3)
    for dim in DIMS:
        if format_ == "int4" and dim % 2:
            continue
        table = rows(dim, 300, dim, format_)
        for weighted in (False, True):
            bags = draw(rng, 7, 300, 100, 40, weighted)
            for mean in (False, True):
                assert same_bits(ours(table, bags, mean, instructions), pooled(table, bags, mean)), (
                    dim,
                    weighted,
                    mean,
                )


@pytest.mark.parametrize("instructions", INSTRUCTIONS)
def test_values_that_are_no_numbers(instructions: str) -> None:
    """Infinities, NaN, subnormal numbers and -0 come out as torch's."""
    special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-40, -1e-45, 65504.0, 6e-8, 3e38, 1.0])
    for table in (Rows(special[:, None].expand(10, 20).contiguous()), Rows(special[:, None].expand(10, 20).half())):
        table = Rows(table.data.contiguous())
        indices = torch.arange(10).repeat_interleave(2)
        for offsets in (torch.arange(0, 21, 2), torch.arange(21), torch.tensor([0, 20])):
            bags = Bags(0, indices, offsets)
            found, wanted = ours(table, bags, False, instructions), pooled(table, bags)
            assert same_bits(torch.nan_to_num(found, 7.0), torch.nan_to_num(wanted, 7.0))
            assert torch.equal(found.isnan(), wanted.isnan())


def test_fp16_sums_are_rounded_to_nearest_even() -> None:
    """Every rounding case of fp16: both instruction sets, against torch's conversion."""
    values = torch.cat([torch.arange(0x10000, dtype=torch.int32).to(torch.int16).view(torch.float16).float()] * 2)
    values = values[values.isfinite()]
    for instructions in INSTRUCTIONS:
        # A sum of two halves need not be a half: all kinds of ties come up.
        table = Rows(values.half().repeat(2).reshape(-1, 1).contiguous())
        count = len(values)
        indices = torch.stack([torch.arange(count), (torch.arange(count) * 7919) % count], 1).reshape(-1)
        bags = Bags(0, indices, torch.arange(0, 2 * count + 1, 2))
        assert same_bits(ours(table, bags, False, instructions), pooled(table, bags))
