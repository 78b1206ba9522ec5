"""How rows are stored and pooled, and the check of bags."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from dlrm import bags, kernels
from dlrm.data.batch import Batch
from dlrm.data.uniform import Uniform
from dlrm.errors import BadIndex, OptionError
from dlrm.placement import Piece
from dlrm.shape import ModelShape, interaction_width
from dlrm.tables import Tables

ROWS = (50, 3, 1000)
DIM = 16
SHAPE = ModelShape(ROWS, DIM, (4, DIM), (interaction_width(3, DIM, "dot", False), 1))


def batch(weighted: bool = False) -> Batch:
    (found,) = Uniform(4, ROWS, 5, 6, False).batches(40, 1)
    if not weighted:
        return found
    random = torch.Generator().manual_seed(3)
    weights = tuple(torch.rand(len(indices), generator=random) for indices in found.indices)
    return Batch(0, found.dense, found.indices, found.offsets, None, weights)


def by_hand(weight: np.ndarray, one: Batch, table: int, mean: bool) -> np.ndarray:
    """Bags in float64."""
    indices, offsets = one.indices[table].numpy(), one.offsets[table].numpy()
    scale = np.ones(len(indices)) if one.weights is None else one.weights[table].numpy().astype(np.float64)
    sums = [
        (weight[indices[lo:hi]].astype(np.float64) * scale[lo:hi, None]).sum(0) / ((hi - lo) if mean else 1)
        for lo, hi in pairwise(offsets.tolist())
    ]
    return np.stack(sums)


@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_pooling_against_float64(bits: int, weighted: bool, pooling: str) -> None:
    """Of the rows as they are stored, sums of 6 terms err by no more than 8 roundings; fp16 rounds the result, too."""
    one, kernel = batch(weighted), kernels.choose(bits)
    tables = Tables(SHAPE, range(3), 1, kernel, pooling)  # type: ignore[arg-type]
    pooled = tables.lookup_all(one).numpy()
    for table in range(3):
        stored = kernel.decode(tables.get_parameter(f"emb_l.{table}.weight").data, DIM).numpy()
        wanted = by_hand(stored, one, table, pooling == "mean")
        scale = np.abs(stored).max() * 6
        rounding = {32: 2**-24, 16: 2**-10, 8: 2**-22, 4: 2**-22}[bits]
        np.testing.assert_allclose(pooled[:, table], wanted, rtol=0, atol=8 * rounding * scale)


@pytest.mark.parametrize(("bits", "step"), [(16, 2**-10), (8, 1 / 255), (4, 1 / 15)])
def test_what_storage_costs(bits: int, step: float) -> None:
    """A stored value is off by half a step of its row's range at most (and by the fp16 scale's own rounding)."""
    weight = torch.from_numpy(np.random.default_rng(1).standard_normal((100, DIM)).astype(np.float32))
    kernel = kernels.choose(bits)
    stored = kernel.empty(100, DIM)
    kernel.store(weight, stored)
    spread = (weight.amax(1) - weight.amin(1)).max() if bits < 16 else weight.abs().max()
    off = (kernel.decode(stored, DIM) - weight).abs().max()
    assert 0 < float(off) <= float(spread) * step * (0.51 if bits > 4 else 0.6)


def test_memory_of_a_row() -> None:
    widths = {bits: kernels.choose(bits).row_bytes(64) for bits in (32, 16, 8, 4)}
    assert widths == {32: 256, 16: 128, 8: 72, 4: 36}
    for bits in widths:
        tables = Tables(SHAPE, range(3), 1, kernels.choose(bits))
        assert tables.nbytes() == sum(ROWS) * kernels.choose(bits).row_bytes(DIM)
    with pytest.raises(OptionError, match="even"):
        kernels.choose(4, dim=15)
    with pytest.raises(OptionError, match="32, 16, 8 or 4"):
        kernels.choose(2)


def test_large_tables_are_encoded_in_parts_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Tables(SHAPE, range(3), 1, kernels.choose(8)).state_dict()
    monkeypatch.setattr(kernels, "ENCODE_ROWS", 7)
    for name, rows in Tables(SHAPE, range(3), 1, kernels.choose(8)).state_dict().items():
        assert torch.equal(rows, whole[name])


@pytest.mark.parametrize("bits", [32, 8])
def test_pieces_sum_up_to_their_table(bits: int) -> None:
    one = batch(weighted=True)
    whole = Tables(SHAPE, [2], 1, kernels.choose(bits)).lookup_all(one)
    parts = [Tables(SHAPE, [Piece(2, rows)], 1, kernels.choose(bits)) for rows in (range(300), range(300, 1000))]
    assert [part.nbytes() for part in parts] == [rows * kernels.choose(bits).row_bytes(DIM) for rows in (300, 700)]
    got = parts[0].lookup_all(one) + parts[1].lookup_all(one)
    torch.testing.assert_close(got, whole, rtol=0, atol=8 * 6 * 2**-22 / math.sqrt(1000))


def test_a_bag_does_not_depend_on_its_neighbours() -> None:
    one = batch()
    for bits in (32, 16, 8, 4):
        tables = Tables(SHAPE, range(3), 1, kernels.choose(bits))
        whole = tables.lookup_all(one)
        for lo, hi in ((0, 1), (3, 17), (39, 40), (5, 5)):
            assert torch.equal(tables.lookup_all(one.slice(lo, hi)), whole[lo:hi])


def test_a_slice_has_just_the_bags_that_are_asked_for() -> None:
    whole, some = batch(weighted=True).slice(3, 17), batch(weighted=True).slice(3, 17, {1})
    assert (some.first, some.size) == (whole.first, whole.size) == (3, 14)
    assert whole.weights is not None
    assert some.weights is not None
    for column in ("indices", "offsets", "weights"):
        ours, theirs = getattr(some, column), getattr(whole, column)
        assert torch.equal(ours[1], theirs[1])
        assert [len(one) for one in ours] == [0, len(theirs[1]), 0]


def test_fbgemm_where_it_is_installed() -> None:
    pytest.importorskip("fbgemm_gpu", reason="the optional extra fbgemm-gpu-cpu is not installed")
    for bits in (8, 4):
        kernel, one = kernels.choose(bits, "fbgemm"), batch(weighted=True)
        tables = Tables(SHAPE, range(3), 1, kernel)
        pooled = tables.lookup_all(one).numpy()
        for table in range(3):
            stored = kernel.decode(tables.get_parameter(f"emb_l.{table}.weight").data, DIM).numpy()
            np.testing.assert_allclose(pooled[:, table], by_hand(stored, one, table, False), rtol=0, atol=1e-3)


def test_fbgemm_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr("dlrm.fbgemm.import_module", absent)
    with pytest.raises(OptionError, match="No module named 'fbgemm_gpu'.*pip install fbgemm-gpu-cpu"):
        kernels.choose(8, "fbgemm")


def broken(**changes: torch.Tensor) -> Batch:
    """Three samples of two tables, one changed."""
    indices = changes.get("indices", torch.tensor([4, 0, 9, 1]))
    offsets = changes.get("offsets", torch.tensor([0, 1, 1, 4]))
    other = torch.tensor([0, 0, 0])
    weights = (torch.ones(3), changes["weights"]) if "weights" in changes else None
    return Batch(100, torch.zeros(3, 1), (other, indices), (torch.arange(4), offsets), None, weights)


@pytest.mark.parametrize(
    ("changes", "says", "position", "value"),
    [
        ({"indices": torch.tensor([4, 0, 10, 1])}, r"index 10 at position 2 \(sample 102\).* table of 10 rows", 2, 10),
        ({"indices": torch.tensor([-1, 0, 99, 1])}, r"index -1 at position 0 \(sample 100\)", 0, -1),
        ({"indices": torch.tensor([4, 0, 9, 1]).int()}, "indices are torch.int32, wanted torch.int64", None, None),
        ({"offsets": torch.tensor([0, 1, 1, 4]).float()}, "offsets are torch.float32", None, None),
        ({"offsets": torch.tensor([0, 3, 2, 4])}, "offset 2 at position 2 is less than the one before it, 3", 2, 2),
        ({"offsets": torch.tensor([1, 1, 2, 4])}, "offset 1 at position 0, wanted 0", 0, 1),
        ({"offsets": torch.tensor([0, 1, 2, 3])}, "offsets end at 3, but there are 4 indices", 3, 3),
        ({"offsets": torch.tensor([0, 1, 4])}, r"offsets have shape \[3\], wanted \[4\]", None, None),
        ({"weights": torch.ones(3)}, r"weights are torch.float32 \[3\], wanted torch.float32 \[4\]", None, None),
        ({"weights": torch.ones(4).double()}, "weights are torch.float64", None, None),
    ],
)
def test_bad_bags_are_named(
    changes: dict[str, torch.Tensor], says: str, position: int | None, value: int | None
) -> None:
    bags.check(broken(), (1, 10), (0, 1))
    bags.check(broken(**changes), (1, 10), (0,))  # somebody else's table
    with pytest.raises(BadIndex, match=f"table 1: .*{says}") as caught:
        bags.check(broken(**changes), (1, 10), (0, 1))
    error = caught.value
    assert (error.table, error.size, error.position, error.value) == (1, 10, position, value)
