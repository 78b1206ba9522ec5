"""Whole runs on several ranks: the same bits whatever the number of ranks, the lag, the delays and the transport."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from dlrm import collect, timeline
from dlrm.options import parse
from dlrm.tables import Tables
from dlrm.worker import Worker
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from torch.distributed import Store

    from dlrm.data.batch import Batch

SMALL = "--arch-mlp-bot 13-64-16 --arch-mlp-top 64-1 --mini-batch-size 101 --num-batches 12 --verify"
DELAY = "exp:p=0.3,mean=2ms"


def serve(rank: int, ranks: int, store: Store, line: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    worker = Worker(parse(line.split()), rank, ranks)
    reports = [worker.run(store, f"run {number}", **changes) for number, changes in enumerate(runs)]
    return [{**report.values, "difference": report.difference} for report in reports if report] or None


def run(ranks: int, line: str, *runs: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
    """What rank 0 reports of each run."""
    first, *others = run_ranks(serve, ranks, line, list(runs) or [{}], **options)
    assert all(result.value is None for result in others)
    assert len(first.value) == max(len(runs), 1)
    for values in first.value:
        assert values["exact"] is True, values["difference"]
        assert values["max_lead_seen"] <= values["lag"]
        assert values["ranks"] == ranks
    return list(first.value)


def digests(values: list[dict[str, Any]]) -> set[tuple[str, str]]:
    return {(one["pooled_sha256"], one["logits_sha256"]) for one in values}


def test_with_blocks_the_digests_depend_on_nothing() -> None:
    runs = [{"lag": 0}, {"lag": 3, "delay": DELAY}]
    found = set()
    for ranks in (1, 2, 3, 5):
        found |= digests(run(ranks, f"{SMALL} --dense-block 32", *runs))
    assert len(found) == 1


def test_without_blocks_the_logits_depend_on_the_number_of_ranks_at_most() -> None:
    pooled = set()
    for ranks in (2, 4):
        found = digests(run(ranks, SMALL, {"lag": 0}, {"lag": 1}, {"lag": 7, "delay": "rotate:every=2,time=3ms"}))
        assert len(found) == 1
        pooled |= {one for one, _ in found}
    assert len(pooled) == 1


@pytest.mark.parametrize(
    ("ranks", "line"),
    [
        (5, "--mini-batch-size 7"),  # more ranks than tables
        (5, "--mini-batch-size 3"),  # and than samples
        (3, "--mini-batch-size 64 --num-indices-per-lookup 30"),
        (2, "--mini-batch-size 9 --arch-interaction-op cat --dense-block 4"),
        (2, "--mini-batch-size 9 --arch-interaction-itself"),
    ],
)
def test_uneven_shapes(ranks: int, line: str) -> None:
    model = "--arch-embedding-size 40-3-1000 --arch-mlp-bot 4-8 --arch-sparse-feature-size 8 --arch-mlp-top 16-1"
    (values,) = run(ranks, f"{model} --num-batches 6 --lag 2 --verify {line}")
    assert values["samples"] == 6 * int(line.split()[1])
    assert values["auc"] is None


def test_a_short_last_batch_and_the_files_format(tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    rows = [
        "\t".join([str(i % 2), *[str(i * j) for j in range(13)], *[f"{i * j:x}" for j in range(26)]]) for i in range(33)
    ]
    path.write_text("\n".join(rows) + "\n")
    line = f"{SMALL} --dense-block 8 --num-batches 0 --mini-batch-size 10 --raw-data-file {path}"
    one, three = run(1, line), run(3, f"{line} --lag 2")
    assert digests(one) == digests(three)
    assert one[0]["samples"] == three[0]["samples"] == 33
    assert one[0]["auc"] == three[0]["auc"] is not None


def test_the_genuine_file() -> None:
    path = Path(os.environ.get("BLSRDMA_TEST_DATA", "")) / "criteo_kaggle_first8000.tsv.gz"
    if not path.is_file():
        pytest.skip("BLSRDMA_TEST_DATA names no folder with criteo_kaggle_first8000.tsv.gz")
    line = f"--raw-data-file {path} --num-batches 0 --mini-batch-size 512 --lag 2"
    (values,) = run(3, f"{SMALL} {line}")
    assert values["samples"] == 8000
    assert round(values["accuracy"] * 8000) == values["accuracy"] * 8000


def test_puts_carry_the_same_bits_as_direct_stores() -> None:
    line = f"{SMALL} --dense-block 32 --lag 2"
    (direct,) = run(3, line)
    (puts,) = run(3, line, env={"BLSRDMA_DIRECT": "0"})
    assert digests([direct]) == digests([puts])
    assert set(direct["bytes_by_path"]) == {"self", "direct"}
    assert set(puts["bytes_by_path"]) == {"self", "put"}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_the_whole_matrix(ranks: int) -> None:
    runs = [{"lag": lag, "delay": delay} for lag in (0, 1, 3, 7) for delay in ("none", DELAY)]
    plain, blocks = run(ranks, SMALL, *runs), run(ranks, f"{SMALL} --dense-block 32", *runs)
    assert len(digests(plain)) == len(digests(blocks)) == 1
    (single,) = run(1, f"{SMALL} --dense-block 32")
    assert digests(blocks) == digests([single])
    assert plain[0]["pooled_sha256"] == single["pooled_sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("direct", ["0", "1"])
@pytest.mark.parametrize("transports", ["tcp,self", "posix,self", "sysv,self", "posix,cma,self"])
def test_every_transport(transports: str, direct: str) -> None:
    line = f"{SMALL} --dense-block 32 --lag 3"
    (single,) = run(1, line)
    values = run(3, line, {}, {"delay": DELAY}, env={"UCX_TLS": transports, "BLSRDMA_DIRECT": direct})
    assert digests(values) == digests([single])


def bound(rank: int, ranks: int, store: Store, lag: int) -> list[Any] | None:
    line = "--arch-mlp-bot 13-16 --arch-mlp-top 8-1 --mini-batch-size 12 --num-batches 24"
    worker = Worker(parse([*line.split(), "--delay", "rotate:every=10,time=300ms"]), rank, ranks)
    report = worker.run(store, lag=lag)
    return report and [report.timelines, report.values["max_lead_seen"]]


@pytest.mark.parametrize("lag", [0, 1, 4])
def test_while_a_rank_stalls_the_others_begin_just_the_next_lag_iterations(lag: int) -> None:
    timelines, lead = run_ranks(bound, 3, lag)[0].value
    assert lead == lag
    stall = 9  # of rank 0
    wakes = timelines[0][stall, timeline.BEGIN] + timelines[0][stall, timeline.SLEPT]
    assert timelines[0][stall, timeline.SLEPT] >= 300e6
    for other in timelines[1:]:
        begin = other[:-1, timeline.BEGIN]
        assert (begin[: stall + lag + 1] < wakes).all()
        assert begin[stall + lag + 1] >= wakes


def flip(rank: int, ranks: int, store: Store) -> list[Any] | None:
    worker = Worker(parse(f"{SMALL} --lag 1".split()), rank, ranks)
    honest = Tables.lookup
    if rank == 1:

        def lookup(self: Tables, batch: Batch, out: torch.Tensor) -> torch.Tensor:
            pooled = honest(self, batch, out)
            if batch.first == 303:
                pooled[70, 4, 5].view(torch.int32).bitwise_xor_(1)
            return pooled

        Tables.lookup = lookup  # type: ignore[method-assign]
    report = worker.run(store)
    return report and [report.values["exact"], report.difference]


def test_verification_finds_one_bit() -> None:
    exact, difference = run_ranks(flip, 2)[0].value
    assert exact is False
    assert (
        "batch 3: pooled vectors differ first at sample 373 (position 70 of its batch), table 17, element 5"
        in difference
    )


def stumble(rank: int, ranks: int, store: Store) -> None:
    worker = Worker(parse(f"{SMALL} --lag 1".split()), rank, ranks)
    if rank == 1:

        def lookup(*_: object) -> torch.Tensor:
            raise ValueError("row 7 is broken")

        worker.tables.lookup = lookup  # type: ignore[method-assign]
    worker.run(store)


def test_the_others_learn_who_failed_and_why() -> None:
    zero, one, two = run_ranks(stumble, 3, check=False, timeout=30)
    assert one.error is not None
    assert one.error.type == "ValueError"
    for other in (zero, two):
        assert other.error is not None
        assert other.error.type == "PeerFailed"
        assert "rank 1" in other.error.message
        assert "row 7 is broken" in other.error.message


def gather(rank: int, ranks: int, store: Store, sizes: list[list[int]]) -> list[Any]:
    from blsrdma import Exchange

    with Exchange(store, rank, ranks, window_bytes=256) as exchange:
        arrays = [np.arange(size[rank], dtype=np.float32) + 1000 * rank for size in sizes]
        found: list[Any] = [collect.gather(exchange, array) for array in arrays]
        found.append(collect.gather_json(exchange, {"rank": rank}))
        collect.barrier(exchange)
    return found


def test_gathering_arrays_of_any_size() -> None:
    sizes = [[0, 0, 0], [64, 65, 0], [1, 1000, 63], [129, 0, 0]]
    zero, *others = (result.value for result in run_ranks(gather, 3, sizes))
    assert all(part is None for other in others for part in other)
    for size, parts in zip(sizes, zero, strict=False):
        for rank, part in enumerate(parts):
            np.testing.assert_array_equal(part, np.arange(size[rank]) + 1000 * rank)
    assert zero[-1] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
