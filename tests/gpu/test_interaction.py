"""The interaction's kernel on the simulated device, against the CPU's order and float64."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from dlrm.dense import DenseWork
from dlrm.errors import OptionError
from dlrm.gpu.interaction import GpuInteraction, bytes_moved, plan, threads_for, tile
from dlrm.model import Dense
from dlrm.placement import Piece, Placement
from dlrm.shape import ModelShape, interaction_width
from tests.gpu.memory import OnDevice
from tests.lookup.bags import same_bits

if TYPE_CHECKING:
    from blsrdma._native import cuda

ROUNDING = 2.0**-24


def model(tables: int, dim: int, interaction: str = "dot", itself: bool = False) -> ModelShape:
    width = interaction_width(tables, dim, interaction, itself)
    return ModelShape((10,) * tables, dim, (3, dim), (width, 1), interaction, itself)  # type: ignore[arg-type]


def assembled(
    bottom: torch.Tensor, parts: list[torch.Tensor], placement: Placement, means: dict[int, torch.Tensor]
) -> torch.Tensor:
    """All vectors, [n, 1 + T, dim], by the CPU's code."""
    shape = model(placement.num_tables, bottom.shape[1])
    slice_ = DenseWork(Dense(shape, 0), 0).slice(range(len(bottom)))
    keep = torch.empty(len(bottom), placement.num_tables, bottom.shape[1])
    slice_.predict(parts, placement.runs, means, keep)
    return torch.cat([bottom[:, None], keep], 1)


def draw(placement: Placement, samples: int, dim: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    random = torch.Generator().manual_seed(dim)
    widths = [len(pieces) for pieces in placement.pieces] + [len(placement.replicated)] * bool(placement.replicated)
    return torch.randn(samples, dim, generator=random), [
        torch.randn(samples, width, dim, generator=random) for width in widths
    ]


def launched(
    on: OnDevice,
    interaction: GpuInteraction,
    bottom: torch.Tensor,
    parts: list[torch.Tensor],
    lengths: torch.Tensor | None = None,
    spare: int = 0,
) -> torch.Tensor:
    samples, stride = len(bottom), interaction.width + spare
    out = on.put(torch.full((samples, stride), torch.nan))
    interaction.launch(
        samples, on.put(bottom), [on.put(part) for part in parts], 0 if lengths is None else on.put(lengths), out, 0,
        feature_stride=stride if spare else None,
    )  # fmt: skip
    return on.floats(out, samples, stride)


def check_products(found: torch.Tensor, vectors: torch.Tensor, itself: bool) -> None:
    """Within the bound of a chain of dim fused multiply-adds, of the model's pairs in their order."""
    dim, exact = vectors.shape[2], vectors.double()
    pairs = Dense(model(vectors.shape[1] - 1, dim, itself=itself), 0).pairs
    products = torch.bmm(exact, exact.transpose(1, 2)).view(len(exact), -1)[:, pairs]
    magnitudes = torch.bmm(exact.abs(), exact.abs().transpose(1, 2)).view(len(exact), -1)[:, pairs]
    bound = dim * ROUNDING / (1 - dim * ROUNDING) * magnitudes
    assert found.shape == products.shape
    assert ((found.double() - products).abs() <= bound).all()


@pytest.mark.parametrize("itself", [False, True])
def test_products(on: OnDevice, itself: bool) -> None:
    """All sizes of tiles, aligned dims and others, more tiles than threads, shared memory for some columns only."""
    cases = (
        (26, 128, None), (1, 16, None), (8, 64, None), (15, 36, None), (63, 256, None), (26, 128, 10 << 10),
        (15, 37, None), (9, 6, 1 << 10), (100, 8, 2000), (40, 100, 10 << 10), (26, 12, 3000),
    )  # fmt: skip
    for tables, dim, limit in cases:
        samples = 2 if tables * dim > 2000 else 5
        placement = Placement(tables, 3)
        bottom, parts = draw(placement, samples, dim)
        interaction = GpuInteraction(on.device, model(tables, dim, itself=itself), placement, limit)
        found = launched(on, interaction, bottom, parts, spare=tables % 4)
        vectors = assembled(bottom, parts, placement, {})
        assert same_bits(found[:, :dim], bottom)
        check_products(found[:, dim : interaction.width], vectors, itself)
        assert not found[:, interaction.width :].any()
        interaction.close()


def test_a_product_is_a_chain_of_multiply_adds(on: OnDevice) -> None:
    """In column order, whatever the tiles and the columns that fit: the same bits."""
    placement = Placement(26, 2)
    bottom, parts = draw(placement, 2, 96)
    vectors = assembled(bottom, parts, placement, {}).numpy().astype(np.longdouble)
    sums = np.zeros((2, 27, 27), np.float32)
    for column in range(96):  # 64 bits of mantissa hold a product exactly, and its sum to far beyond fp32
        sums = (vectors[:, :, None, column] * vectors[:, None, :, column] + sums).astype(np.float32)
    wanted = torch.from_numpy(np.stack([sums[:, i, j] for i in range(27) for j in range(i)], 1))
    for limit in (None, 9000, 5000):
        interaction = GpuInteraction(on.device, model(26, 96), placement, limit)
        assert same_bits(launched(on, interaction, bottom, parts)[:, 96:], wanted)


@pytest.mark.parametrize("interaction", ["dot", "cat"])
def test_tables_that_are_cut_by_rows_or_replicated(on: OnDevice, interaction: str) -> None:
    """Parts are added in rank order and divided at the end: the CPU's bits. Also where rows are not aligned to 16."""
    pieces = (
        (Piece(4), Piece(0, range(4)), Piece(2)),
        (Piece(0, range(4, 9)), Piece(5, range(3))),
        (),
        (Piece(5, range(3, 10)), Piece(3), Piece(0, range(9, 10))),
    )
    placement = Placement(6, 4, pieces, (1,))
    assert placement.divided == (0, 5)
    for dim, mean in itertools.product((16, 5, 130), (False, True)):
        bottom, parts = draw(placement, 6, dim)
        lengths = torch.randint(1, 9, (2, 6), generator=torch.Generator().manual_seed(1)).float()
        means = {table: lengths[number][:, None] for number, table in enumerate(placement.divided)} if mean else {}
        vectors = assembled(bottom, parts, placement, means)
        made = GpuInteraction(on.device, model(6, dim, interaction), placement)
        found = launched(on, made, bottom, parts, lengths if mean else None, spare=3)
        if interaction == "cat":
            assert same_bits(found[:, : made.width], vectors.reshape(6, -1))
            assert not found[:, made.width :].any()
        else:
            assert same_bits(found[:, :dim], bottom)
            check_products(found[:, dim : made.width], vectors, False)
            one = launched(
                on, GpuInteraction(on.device, model(6, dim, "cat"), placement), bottom, parts, lengths if mean else None
            )
            whole = GpuInteraction(on.device, model(6, dim), Placement(6, 1))  # what came whole: the same products
            assert same_bits(launched(on, whole, bottom, [one.view(6, 7, dim)[:, 1:]]), found[:, : made.width])
        made.close()


def test_what_cannot_be(device: cuda.Device) -> None:
    with pytest.raises(OptionError, match="no rank has anything of table 1"):
        GpuInteraction(device, model(2, 4), Placement(2, 1, ((Piece(0),),)))
    with pytest.raises(OptionError, match="400 parts"):
        GpuInteraction(device, model(2, 4), Placement(2, 400))
    with pytest.raises(OptionError, match="does not fit in 1024 bytes"):
        GpuInteraction(device, model(200, 4), Placement(200, 1), 1024)
    interaction = GpuInteraction(device, model(2, 4), Placement(2, 2))
    with pytest.raises(ValueError, match="1 parts, wanted 2"):
        interaction.launch(1, 16, [16], 0, 16, 0)
    with pytest.raises(ValueError, match="strides 4, 6: at least 4, 7"):
        interaction.launch(1, 16, [16, 16], 0, 16, 0, feature_stride=6)
    interaction.launch(0, 0, [0, 0], 0, 0, 0)


def test_plan() -> None:
    """All columns where they fit; then as many as do, in rows that lie in other banks; products last."""
    assert plan(27, 128, 351, 227 << 10) == (128, 132, True, 27 * 132 * 4 + 351 * 4)
    assert plan(64, 256, 2016, 227 << 10) == (256, 260, True, 64 * 260 * 4 + 2016 * 4)
    assert plan(64, 256, 2016, 48 << 10) == (128, 132, True, 64 * 132 * 4 + 2016 * 4)
    assert plan(400, 8, 79800, 48 << 10) == (8, 12, False, 400 * 12 * 4)
    for features, dim in itertools.product((2, 9, 27, 64, 200), (1, 4, 6, 16, 20, 100, 128, 300)):
        columns, stride, _, size = plan(features, dim, features, 8 << 10)
        assert size <= 8 << 10
        assert stride >= columns
        assert stride // 4 % 2 == 1
        assert columns == dim or columns % 4 == 0
    assert [(tile(features), threads_for(features)) for features in (2, 9, 13, 27, 64, 500)] == [
        (1, 32), (1, 64), (2, 32), (4, 32), (4, 160), (4, 256)
    ]  # fmt: skip


def test_bytes_moved(device: cuda.Device) -> None:
    """What MLPerf's model must read and write for a sample."""
    interaction = GpuInteraction(device, model(26, 128), Placement(26, 2))
    assert bytes_moved(interaction, 10) == 10 * 4 * (27 * 128 + 128 + 351)
    assert bytes_moved(interaction, 10, 480) == 10 * 4 * (27 * 128 + 480)
