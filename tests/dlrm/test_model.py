"""Parameters, formulas, and the bits of the dense work."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from dlrm.data.uniform import Uniform
from dlrm.dense import DenseWork, blocks
from dlrm.model import Dense
from dlrm.placement import Placement
from dlrm.shape import ModelShape, interaction_width
from dlrm.tables import Tables
from dlrm.verify import SingleProcess, first_difference

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dlrm.data.batch import Batch

ROWS = (50, 3, 1000, 7, 20)
DIM = 8


def shape(interaction: str = "dot", itself: bool = False) -> ModelShape:
    width = interaction_width(len(ROWS), DIM, interaction, itself)
    return ModelShape(ROWS, DIM, (4, 32, DIM), (width, 64, 32, 1), interaction, itself)  # type: ignore[arg-type]


def test_names_and_shapes_are_those_of_the_reference() -> None:
    whole = shape()
    parameters = {
        name: tuple(tensor.shape)
        for module in (Tables(whole, range(5), 1), Dense(whole, 1))
        for name, tensor in module.state_dict().items()
    }
    assert parameters == whole.parameters()
    assert parameters["emb_l.2.weight"] == (1000, 8)
    assert parameters["bot_l.2.weight"] == (8, 32)
    assert parameters["top_l.0.weight"] == (64, 8 + 15)
    assert parameters["top_l.4.bias"] == (1,)


def test_a_table_is_the_same_whoever_owns_it() -> None:
    whole = Tables(shape(), range(5), 1).state_dict()
    for owned in Placement(5, 3).tables:
        for name, weight in Tables(shape(), owned, 1).state_dict().items():
            assert torch.equal(weight, whole[name])
    bound = (1 / 1000) ** 0.5
    assert 0.9 * bound < float(whole["emb_l.2.weight"].abs().max()) <= bound
    assert not torch.equal(whole["emb_l.0.weight"], Tables(shape(), range(1), 2).state_dict()["emb_l.0.weight"])


def in_float64(
    weights: dict[str, NDArray[np.float64]], batch: Batch, sample: int, interaction: str, itself: bool
) -> tuple[NDArray[np.float64], float, float]:
    """Pooled vectors and logit of a sample, in NumPy alone; and the sum of the sizes of the logit's terms."""
    vector = batch.dense[sample].numpy().astype(np.float64)
    for layer in (0, 2):
        vector = np.maximum(weights[f"bot_l.{layer}.weight"] @ vector + weights[f"bot_l.{layer}.bias"], 0)
    vectors = [vector]
    for table in range(5):
        lo, hi = batch.offsets[table][sample : sample + 2].tolist()
        vectors.append(weights[f"emb_l.{table}.weight"][batch.indices[table][lo:hi].numpy()].sum(0))
    if interaction == "cat":
        value = np.concatenate(vectors)
    else:
        products = [vectors[i] @ vectors[j] for i in range(6) for j in range(6) if j < i or (itself and i == j)]
        value = np.concatenate([vector, products])
    for layer in (0, 2):
        value = np.maximum(weights[f"top_l.{layer}.weight"] @ value + weights[f"top_l.{layer}.bias"], 0)
    last, bias = weights["top_l.4.weight"][0], weights["top_l.4.bias"][0]
    return np.stack(vectors[1:]), float(last @ value + bias), float(np.abs(last) @ value + abs(bias))


@pytest.mark.parametrize(("block", "kernel"), [(0, "torch"), (24, "torch"), (0, "onednn"), (24, "onednn")])
@pytest.mark.parametrize(("interaction", "itself"), [("dot", False), ("dot", True), ("cat", False)])
def test_against_an_independent_float64_computation(interaction: str, itself: bool, block: int, kernel: Any) -> None:
    """Relative errors under 1e-5: of all vectors, of all logits, and of each probability.

    A single logit may be a small difference of large terms: its error is relative to those.
    """
    whole = shape(interaction, itself)
    for seed in (1, 2, 3):
        (batch,) = Uniform(4, ROWS, seed, 4, False).batches(64, 1)
        tables, dense = Tables(whole, range(5), seed), Dense(whole, seed)
        dense.kernel = kernel
        pooled, logits, probabilities = SingleProcess(tables, dense, Placement(5, 1), block).evaluate(batch)
        weights = {
            name: tensor.numpy().astype(np.float64)
            for module in (tables, dense)
            for name, tensor in module.state_dict().items()
        }
        found = [in_float64(weights, batch, sample, interaction, itself) for sample in range(64)]
        vectors, wanted, sizes = (np.array(column) for column in zip(*found, strict=True))
        errors = np.abs(logits.numpy() - wanted)
        np.testing.assert_allclose(pooled.numpy(), vectors, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(logits.numpy(), wanted, rtol=1e-4, atol=1e-5)
        assert np.linalg.norm(pooled.numpy() - vectors) < 1e-5 * np.linalg.norm(vectors)
        assert np.linalg.norm(errors) < 1e-5 * np.linalg.norm(wanted)
        assert (errors < 1e-5 * sizes).all()
        np.testing.assert_allclose(probabilities.numpy(), 1 / (1 + np.exp(-wanted)), rtol=1e-5)
        assert wanted.std() > 1e-3  # of what there is to be compared


@pytest.mark.parametrize("size", [0, 1, 4, 7, 32])
@pytest.mark.parametrize("samples", [range(0), range(1), range(3, 9), range(5, 40), range(32, 64)])
def test_blocks_cover_a_slice_and_put_each_sample_in_its_row(samples: range, size: int) -> None:
    seen = []
    for block in blocks(samples, size):
        for offset in range(block.hi - block.lo):
            sample = samples.start + block.lo + offset
            seen.append(sample)
            if size:
                assert block.row + offset == sample % size
                assert block.size == size
        assert block.rows.stop <= block.size
    assert seen == list(samples)


@pytest.mark.parametrize(("block", "kernel"), [(8, "torch"), (15, "torch"), (32, "torch"), (15, "onednn")])
def test_with_blocks_the_bits_do_not_depend_on_the_slices(block: int, kernel: Any) -> None:
    torch.set_num_threads(1)
    rows = (100,) * 26
    width = interaction_width(26, 16, "dot", False)
    whole = ModelShape(rows, 16, (13, 512, 256, 64, 16), (width, 512, 256, 1))
    (batch,) = Uniform(13, rows, 3, 2, False).batches(101, 1)
    tables, dense = Tables(whole, range(26), 1), Dense(whole, 1)
    dense.kernel = kernel
    wanted = SingleProcess(tables, dense, Placement(26, 1), block).evaluate(batch)
    for ranks in (2, 3, 4, 5, 7, 101, 120):
        got = SingleProcess(tables, dense, Placement(26, ranks), block).evaluate(batch)
        for ours, theirs in zip(got, wanted, strict=True):
            assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32)), ranks


def test_pooled_vectors_come_from_parts_in_table_order() -> None:
    whole = shape()
    (batch,) = Uniform(4, ROWS, 3, 4, False).batches(10, 1)
    wanted = Tables(whole, range(5), 1).lookup_all(batch)
    parts = [Tables(whole, owned, 1).lookup_all(batch)[2:7] for owned in Placement(5, 7).tables]
    assert [part.shape[1] for part in parts] == [1, 1, 1, 1, 1, 0, 0]
    piece = DenseWork(Dense(whole, 1), 4).slice(range(2, 7))
    piece.bottom(batch.dense)
    pooled = torch.empty(5, 5, DIM)
    piece.predict(parts, keep=pooled)
    assert torch.equal(pooled, wanted[2:7])


def test_first_difference_names_sample_and_table() -> None:
    wanted = np.zeros((4, 3, 2), np.float32)
    assert first_difference("pooled", wanted.copy(), wanted, 40) is None
    got = wanted.copy()
    got[2, 1, 0] = -0.0  # one bit
    text = first_difference("pooled", got, wanted, 40)
    assert text is not None
    assert "sample 42 (position 2 of its batch), table 1, element 0" in text
