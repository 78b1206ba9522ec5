"""The library call, input that travels, open loops, and what a fitted model predicts on any number of ranks."""

from __future__ import annotations

import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

import dlrm
from dlrm import arrivals, fit
from dlrm.data.uniform import Uniform
from dlrm.errors import OptionError
from dlrm.options import parse
from dlrm.shape import ModelShape, interaction_width
from dlrm.worker import Worker
from tests.dlrm.test_runs import digests, run
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed import Store

    from dlrm.data.batch import Batch

SMALL = "--arch-mlp-bot 13-64-16 --arch-mlp-top 64-1 --mini-batch-size 101 --num-batches 12 --verify --dense-block 32"
ROWS = (50, 1000, 3)
SHAPE = ModelShape(ROWS, 8, (4, 16, 8), (interaction_width(3, 8, "dot", False), 16, 1))


def test_every_way_of_input_and_placement_has_the_same_bits() -> None:
    single = run(1, SMALL)
    changed = [
        run(3, f"{SMALL} --input sharded", {"lag": 0}, {"lag": 3, "delay": "exp:p=0.3,mean=2ms"}),
        run(3, f"{SMALL} --placement greedy --replicate-below 30 --lag 2"),
    ]
    for values in changed:
        assert digests(values) == digests(single)
        assert values[0]["auc"] == single[0]["auc"]


@pytest.mark.slow
def test_and_in_an_open_loop() -> None:
    single = run(1, SMALL)
    for values in (
        run(2, f"{SMALL} --placement worst --input sharded --replicate-below 30 --lag 1"),
        run(2, f"{SMALL} --arrival-rate 500 --lag 1"),
        run(3, f"{SMALL} --input sharded --arrival-rate 500 --arrival fixed --quiet 1:5ms:50ms --lag 1"),
    ):
        assert digests(values) == digests(single)


def test_row_wise_sums_are_the_same_in_every_run_of_a_placement() -> None:
    line = f"{SMALL} --row-wise-above 5000 --pooling mean"
    found = run(3, line, {"lag": 0}, {"lag": 3, "delay": "exp:p=0.3,mean=2ms"}) + run(
        3, f"{line} --input sharded --lag 1"
    )
    assert len(digests(found)) == 1


@pytest.mark.parametrize("bits", [pytest.param(16, marks=pytest.mark.slow), 8, pytest.param(4, marks=pytest.mark.slow)])
def test_stored_otherwise_the_digest_is_another_one(bits: int) -> None:
    line = f"{SMALL} --quantize-emb-with-bit {bits}"
    one, two = run(1, line), run(2, f"{line} --lag 2")
    assert digests(one) == digests(two)
    assert one[0]["kernel"] == f"torch-{'fp' if bits == 16 else 'int'}{bits}"
    rows = sum(min(rows, 10_000) for rows in dlrm.data.KAGGLE_ROWS)  # type: ignore[attr-defined]
    assert one[0]["table_bytes"] == [rows * {16: 32, 8: 24, 4: 12}[bits]]


def disagree(rank: int, ranks: int, store: Store) -> None:
    worker = Worker(parse([*SMALL.split(), "--quantize-emb-with-bit", "8" if rank == 1 else "32"]), rank, ranks)
    worker.run(store)


def test_ranks_that_disagree_are_told() -> None:
    for result in run_ranks(disagree, 3, check=False, timeout=30):
        assert result.error is not None
        assert result.error.type == "Disagreement"
        assert "kernel: rank 1 has torch-int8, sum, rank 0 has torch-fp32, sum" in result.error.message


def call(rank: int, ranks: int, store: Store, lag: int, kind: Any, counts: list[int]) -> list[Any]:
    """Replicated: all ranks bring the batches of rank 0; sharded: each its own, of its own size and number."""
    model = dlrm.Model.build(SHAPE, rank, ranks, seed=5)
    own = rank if kind == "sharded" else 0
    batches = islice(Uniform(4, ROWS, own, 4, False).batches(20 + own, 9), counts[own])
    running = dlrm.serve(model, batches, lag=lag, input=kind, batch_size=30, store=store, timeout=20)
    return [(one.first, one.logits.numpy().copy()) for one in running]


@pytest.mark.parametrize("lag", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_the_library_call(lag: int) -> None:
    alone = [run_ranks(call, 1, 0, "replicated", [6])[0].value]
    parts = [result.value for result in run_ranks(call, 3, lag, "replicated", [6, 0, 0])]
    for i in range(6):
        assert [part[i][0] for part in parts] == [20 * i, 20 * i + 7, 20 * i + 14]
        joined = np.concatenate([part[i][1] for part in parts])
        np.testing.assert_allclose(joined, alone[0][i][1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("lag", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_ranks_with_batches_of_their_own_end_when_all_have_ended(lag: int) -> None:
    counts = [3, 0, 9]
    results = [result.value for result in run_ranks(call, 3, lag, "sharded", counts)]
    assert [len(value) for value in results] == counts
    model = dlrm.Model.build(SHAPE, 0, 1, seed=5)
    for rank, value in enumerate(results):
        for (first, logits), batch in zip(value, Uniform(4, ROWS, rank, 4, False).batches(20 + rank, 9), strict=False):
            assert first == batch.first
            with torch.inference_mode():
                vectors = torch.cat([model.dense.bottom(batch.dense)[:, None], model.tables.lookup_all(batch)], dim=1)
                np.testing.assert_allclose(logits, model.dense.top(vectors)[0].numpy(), rtol=1e-4, atol=1e-6)


def spoil(rank: int, ranks: int, store: Store, kind: Any) -> tuple[int, str]:
    model = dlrm.Model.build(SHAPE, rank, ranks, seed=5)

    def batches() -> Iterator[Batch]:
        for batch in Uniform(4, ROWS, 1, 4, False).batches(20, 6):
            if batch.first == 60 and (rank == 1 or kind == "replicated"):
                batch.indices[1][7] = 1000
            yield batch

    done = 0
    try:
        for _ in dlrm.serve(model, batches(), input=kind, store=store, timeout=20):
            done += 1
    except Exception as error:
        return done, f"{type(error).__name__}: {error}"
    return done, ""


@pytest.mark.parametrize("kind", ["replicated", "sharded"])
def test_a_bad_index_ends_the_run_before_its_batch_is_sent(kind: str) -> None:
    zero, one = (result.value for result in run_ranks(spoil, 2, kind))
    told = [text for _, text in (zero, one) if text.startswith("BadIndex: table 1: index 1000 at position 7 ")]
    assert len(told) >= 1  # the owner of the table, or the rank whose batch it is
    assert all("index 1000 at position 7" in text for _, text in (zero, one))  # the other was told by PeerFailed
    assert zero[0] <= 3
    assert one[0] <= 3


def late(rank: int, ranks: int, store: Store) -> list[float]:
    """Between two batches rank 0 waits for a long time; when did the predictions of the first come?"""
    model = dlrm.Model.build(SHAPE, rank, ranks, seed=5)
    began = time.monotonic()
    plan = arrivals.Arrivals(2.0, False, 0)
    running = dlrm.serve(model, Uniform(4, ROWS, 1, 4, False).batches(20, 3), lag=2, arrivals=plan, store=store)
    return [time.monotonic() - began for _ in running]


def test_predictions_do_not_wait_for_the_next_batch() -> None:
    for result in run_ranks(late, 2):
        first, second, third = result.value
        assert second - first > 0.3
        assert third - second > 0.3


def test_arrivals_are_a_function_of_seed_and_stream() -> None:
    poisson = arrivals.Arrivals(100.0, True, 7)
    one, again, other = (
        [next(times) for _ in range(5000)] for times in (poisson.times(0, 0), poisson.times(3, 0), poisson.times(0, 1))
    )
    assert one == again != other
    gaps = np.diff(one)
    assert (gaps >= 0).all()
    assert abs(gaps.mean() * 100 - 1) < 0.06
    assert abs(gaps.std() * 100 - 1) < 0.1
    quiet = arrivals.Arrivals(100.0, False, 7, arrivals.parse_quiet("1:95ms:1s"))
    times = [next(one) for one in [quiet.times(1, 1)] for _ in range(12)]
    np.testing.assert_allclose(times, [*np.arange(1, 10) / 100, 1.1, 1.11, 1.12])
    assert next(quiet.times(0, 0)) == 0.01
    for text in ("1:2:3", "x", "1:2s"):
        with pytest.raises(OptionError, match="is not understood"):
            arrivals.parse_quiet(text)


@pytest.mark.slow
def test_a_fitted_model_predicts_the_same_everywhere(test_data: Path, tmp_path: Path) -> None:
    path = test_data / "criteo_kaggle_first8000.tsv.gz"
    if not path.is_file():
        pytest.skip("criteo_kaggle_first8000.tsv.gz is not in BLSRDMA_TEST_DATA")
    fit.fit(str(path), str(tmp_path / "model.pt"), fit.Recipe(samples=6400))
    line = f"--raw-data-file {path} --first-sample 6400 --load-model {tmp_path}/model.pt --arch-sparse-feature-size 8 "
    line += "--arch-mlp-bot 13-64-8 --arch-mlp-top 64-1 --mini-batch-size 128 --verify --dense-block 32"
    (single,) = run(1, line)
    assert single["samples"] == 1600
    assert single["auc"] >= 0.70
    assert single["normalised_entropy"] < 0.95
    for ranks in (2, 3, 4, 5):
        lags = [{"lag": lag, "delay": "exp:p=0.2,mean=1ms" if lag % 2 else "none"} for lag in range(8)]
        values = run(ranks, line, *lags, timeout=300)
        assert digests(values) == digests([single])
        assert {one["auc"] for one in values} == {single["auc"]}
    (eighth,) = run(2, f"{line} --quantize-emb-with-bit 8")
    assert abs(eighth["auc"] - single["auc"]) < 0.002
    ratio = sum(eighth["table_bytes"]) / sum(single["table_bytes"])
    assert ratio == pytest.approx((8 + 8) / (4 * 8), rel=0.02)


def memory(rank: int, ranks: int, store: Store, line: str) -> tuple[list[int], list[int]] | None:
    report = Worker(parse(line.split()), rank, ranks).run(store)
    return report and (report.values["plan"]["memory_bytes"], report.values["resident_bytes"])


@pytest.mark.slow
def test_memory_is_what_the_plan_printed() -> None:
    """Criteo Kaggle's tables, none above two million rows: 0.6 GB. All of them: --max-ind-range -1, 2.2 GB."""
    line = "--max-ind-range 2000000 --placement greedy --lag 2 --num-batches 20 --mini-batch-size 2048"
    planned, resident = run_ranks(memory, 4, line, timeout=300)[0].value
    assert len(planned) == len(resident) == 4
    for wanted, got in zip(planned, resident, strict=True):
        assert abs(got - wanted) < 0.1 * wanted
