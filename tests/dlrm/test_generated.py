"""The embedded sample, uniform batches, and preloading."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dlrm.data import criteo_rows
from dlrm.data.batch import Batch, preload
from dlrm.data.synthetic import SAMPLES, CriteoSample
from dlrm.data.uniform import Uniform
from dlrm.metrics import auc

ROWS = criteo_rows(10_000)


def same(a: Batch, b: Batch) -> bool:
    if (a.labels is None) != (b.labels is None):
        return False
    labels = a.labels is None or b.labels is None or torch.equal(a.labels, b.labels)
    pairs = zip((a.dense, *a.indices, *a.offsets), (b.dense, *b.indices, *b.offsets), strict=True)
    return a.first == b.first and labels and all(torch.equal(x, y) for x, y in pairs)


def test_the_sample_is_the_same_every_time_and_another_with_another_seed() -> None:
    first, second, other = CriteoSample(ROWS, 1), CriteoSample(ROWS, 1), CriteoSample(ROWS, 2)
    assert all(same(a, b) for a, b in zip(first.batches(512, 3), second.batches(512, 3), strict=True))
    assert not same(next(first.batches(64, 1)), next(other.batches(64, 1)))


def test_the_sample_does_not_depend_on_the_batch_size_and_starts_over() -> None:
    sample = CriteoSample(ROWS, 1)
    assert sum(batch.size for batch in sample.batches(100, 0)) == SAMPLES
    small = torch.cat([batch.dense for batch in sample.batches(100, 0)])
    assert torch.equal(small, sample.dense)
    *_, last = sample.batches(SAMPLES, 2)
    assert last.first == SAMPLES
    assert torch.equal(last.dense, sample.dense)


def test_the_sample_looks_like_criteo() -> None:
    sample = CriteoSample(ROWS, 123)
    assert 0.18 < float(sample.labels.mean()) < 0.32
    assert 0.7 < (auc(sample.labels.numpy(), sample.logits) or 0) < 0.95  # of the planted model itself
    values = np.expm1(sample.dense.numpy().astype(np.float64))
    assert (values >= 0).all()
    np.testing.assert_allclose(values, values.round(), rtol=1e-5)  # integers
    assert (sample.dense[:, 11] == 0).float().mean() > 0.75
    assert values[:, 4].max() > 1e5  # a heavy tail
    for table, rows in enumerate(ROWS):
        assert 0 <= int(sample.rows[table].min())
        assert int(sample.rows[table].max()) < rows
    top = torch.bincount(sample.rows[2], minlength=ROWS[2]).sort(descending=True).values
    assert 0.25 < float(top[:100].sum()) / SAMPLES < 0.75  # 1 % of the rows of a large table
    top = torch.bincount(sample.rows[0], minlength=ROWS[0]).sort(descending=True).values
    assert float(top[0]) / SAMPLES > 0.4  # C1, s 1.8


@pytest.mark.parametrize("fixed", [True, False])
def test_uniform_batches(fixed: bool) -> None:
    source = Uniform(4, (50, 3), 7, 5, fixed)
    one, two = list(source.batches(32, 2)), list(source.batches(32, 2))
    assert all(same(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0].dense, one[1].dense)
    for indices, offsets, rows in zip(one[0].indices, one[0].offsets, source.table_rows, strict=True):
        lengths = offsets.diff()
        assert int(offsets[-1]) == len(indices)
        assert int(indices.max()) < rows
        assert int(lengths.max()) == 5
        assert int(lengths.min()) == (5 if fixed else 1)


def test_preload_reads_ahead_up_to_its_limit_and_loses_nothing() -> None:
    read: list[int] = []

    def batches() -> object:
        for batch in CriteoSample(ROWS, 1).batches(256, 6):
            read.append(batch.first)
            yield batch

    size = next(CriteoSample(ROWS, 1).batches(256, 1)).nbytes
    ready = preload(batches(), limit=2 * size)  # type: ignore[arg-type]
    assert read == [0, 256]
    assert [batch.first for batch in ready] == list(range(0, 6 * 256, 256))
