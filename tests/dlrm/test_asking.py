"""Runs without a collective: the same bits as over the exchange, whatever the mode, the rows and the delays."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.distributed import HashStore

import dlrm
from dlrm.data.uniform import Uniform
from dlrm.errors import OptionError
from dlrm.options import parse
from dlrm.placement import Piece, Placement
from tests.dlrm.test_runs import digests, run, serve
from tests.dlrm.test_serving import ROWS, SHAPE, SMALL
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from torch.distributed import Store

DELAY = "exp:p=0.3,mean=2ms"


def asked(ranks: int, line: str, *runs: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    """What rank 0 reports of each run, all of them exact."""
    reports = run_ranks(serve, ranks, line, list(runs) or [{}], **options)[0].value
    for values in reports:
        assert values["exact"] is True, values["difference"]
        assert values["max_lead_seen"] is None
    return list(reports)


@pytest.mark.parametrize("mode", ["put", "get", pytest.param("auto", marks=pytest.mark.slow)])
def test_the_same_bits_as_over_the_exchange(mode: str) -> None:
    single = run(1, SMALL)
    found = asked(3, f"{SMALL} --exchange {mode}", {"lag": 0}, {"lag": 3, "delay": DELAY}, {"input": "sharded"})
    assert digests(found) == digests(single)
    assert found[0]["auc"] == single[0]["auc"]
    assert set(found[0]["bytes_by_path"]) == {"self", "direct" if mode == "put" else "read"}


@pytest.mark.parametrize(
    "line",
    [
        "--row-wise-above 5000 --replicate-below 30 --placement greedy --quantize-emb-with-bit 8",
        pytest.param("--pooling mean", marks=pytest.mark.slow),
        pytest.param("--quantize-emb-with-bit 16", marks=pytest.mark.slow),
        pytest.param("--quantize-emb-with-bit 4", marks=pytest.mark.slow),
        pytest.param("--placement worst --window-bytes 1000", marks=pytest.mark.slow),
        pytest.param("--num-indices-per-lookup 30 --mini-batch-size 64", marks=pytest.mark.slow),
    ],
)
def test_with_every_kind_of_rows(line: str) -> None:
    collective = run(2, f"{SMALL} {line} --lag 1")
    open_loop = {"arrival_rate": 400.0, "input": "sharded"}
    found = asked(2, f"{SMALL} {line} --lag 1 --exchange put", {}, open_loop)
    found += asked(2, f"{SMALL} {line} --exchange get")
    assert digests(found) == digests(collective)


@pytest.mark.slow
def test_over_tcp() -> None:
    env = {"UCX_TLS": "tcp,self", "BLSRDMA_DIRECT": "0"}
    found = asked(2, f"{SMALL} --lag 2 --exchange put", env=env) + asked(2, f"{SMALL} --exchange auto", env=env)
    assert digests(found) == digests(run(1, SMALL))
    assert set(found[0]["bytes_by_path"]) == set(found[1]["bytes_by_path"]) == {"self", "put"}
    ranks = run_ranks(serve, 2, f"{SMALL} --exchange get", [{}], env=env, check=False)
    assert all(rank.error is not None and rank.error.type == "ReadsUnavailable" for rank in ranks), ranks
    assert "use mode put, or auto" in str(ranks[0])


def test_what_does_not_go_together() -> None:
    with pytest.raises(OptionError, match="wants --table-kernel torch"):
        parse("--exchange put --table-kernel fbgemm --quantize-emb-with-bit 8".split())
    ranks = run_ranks(serve, 2, f"{SMALL} --exchange put --row-wise-above 5000 --pooling mean", [{}], check=False)
    assert all(rank.error is not None and rank.error.type == "OptionError" for rank in ranks)


def one_dies(rank: int, ranks: int, store: Store, degrade: bool) -> list[Any]:
    """Rank 1 is killed after some batches; ranks 0 and 2 go on to the end, with zeros for what it owned."""
    model = dlrm.Model.build(SHAPE, rank, ranks, seed=3)
    batches = Uniform(4, ROWS, rank, 5, False).batches(16, 12)

    def feed() -> Any:
        for number, batch in enumerate(batches):
            if rank == 1 and number == 6:
                store.wait(["predicted 0", "predicted 2"])
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    found = []
    how = "degrade" if degrade else "raise"
    for predictions in dlrm.serve(
        model, feed(), lag=1, store=store, exchange="put", on_peer_failure=how, input="sharded", timeout=30.0
    ):
        found.append(predictions.logits.numpy())
        if len(found) == 3:
            store.set(f"predicted {rank}", "1")
        if len(found) == 6 and rank != 1:
            while os.path.exists(f"/proc/{store.get('pid').decode()}/fd"):  # noqa: PTH110 - until it is dead
                pass
    return found


def updated(rank: int, ranks: int, store: Store, mode: str) -> list[Any]:
    """Each rank gets tables drawn from other seeds, at a batch of its own; what it predicts, and with which version."""
    split = Placement(SHAPE.num_tables, ranks, ((Piece(0),), (Piece(1),)), (2,))
    models = [dlrm.Model.build(SHAPE, rank, ranks, seed=seed, placement=split) for seed in (3, 4, 5)]
    models = [models[0], *(replace(one, dense=models[0].dense) for one in models[1:])]
    batches = Uniform(4, ROWS, rank, 5, False).batches(16, 100_000)
    coming = [(1, models[1]), (2, models[2])]
    fed = 0

    def feed() -> Any:
        nonlocal fed
        for batch in batches:
            fed += 1
            yield batch
            if fed > 30:
                time.sleep(0.001)
                if seen >= 2:
                    return

    def due() -> tuple[int, dlrm.Model] | None:
        return coming.pop(0) if coming and fed > 4 * (rank + 1) else None

    found, seen = [], 0
    for predictions in dlrm.serve(
        models[0],
        feed(),
        lag=2,
        store=store,
        exchange=mode,
        input="sharded",
        timeout=30.0,
        updates=due,  # type: ignore[arg-type]
    ):
        found.append((predictions.version, predictions.logits.numpy()))
        seen = predictions.version
    return found


@pytest.mark.parametrize("mode", ["put", pytest.param("get", marks=pytest.mark.slow)])
def test_tables_are_replaced_between_batches(mode: str) -> None:
    """Bits are those of one process with the tables of the version that the predictions name."""
    results = run_ranks(updated, 2, mode, timeout=60)
    singles = [dlrm.Model.build(SHAPE, 0, 1, seed=seed) for seed in (3, 4, 5)]
    singles = [singles[0], *(replace(one, dense=singles[0].dense) for one in singles[1:])]
    for rank, result in enumerate(results):
        versions = [version for version, _ in result.value]
        assert versions == sorted(versions)
        assert (versions[0], versions[-1]) == (0, 2)
        store = HashStore()
        expected = [
            [each.logits.numpy() for each in dlrm.serve(
                single, Uniform(4, ROWS, rank, 5, False).batches(16, len(versions)), store=store, name=f"single {n}"
            )] for n, single in enumerate(singles)
        ]  # fmt: skip
        for number, (version, logits) in enumerate(result.value):
            assert (logits == expected[version][number]).all(), (rank, number, version)


def with_pid(rank: int, ranks: int, store: Store, degrade: bool) -> list[Any]:
    if rank == 1:
        store.set("pid", str(os.getpid()))
    return one_dies(rank, ranks, store, degrade)


def test_a_dead_owner_is_degraded_where_that_is_asked_for() -> None:
    results = run_ranks(with_pid, 3, True, expect_exit={1: -signal.SIGKILL}, timeout=60)
    assert [len(results[rank].value) for rank in (0, 2)] == [12, 12]
    again = run_ranks(with_pid, 3, False, check=False, timeout=60)
    for rank in (0, 2):
        error = again[rank].error
        assert error is not None
        assert error.type == "PeerFailed"
        assert "rank 1 died" in error.message
    assert all(np.isfinite(each).all() for rank in (0, 2) for each in results[rank].value)
    assert torch.get_num_threads() == 1
