"""The DLRM engine on the simulated GPU: pooled vectors have the CPU's bits, logits are within fp32's bound, and have
the same bits whatever the number of ranks, the lag and the path, where blocks are the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.distributed import PrefixStore

from blsrdma.errors import MemoryLimitExceeded
from dlrm import bags
from dlrm.errors import OptionError
from dlrm.options import parse
from dlrm.worker import Worker
from tests.gpu import simulated
from tests.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch.distributed import Store

    from dlrm.data.batch import Batch
    from dlrm.gpu.worker import GpuWorker
    from dlrm.loop import Predictions

MODEL = "--arch-embedding-size 40-3-300-20-1000 --arch-mlp-bot 5-16-8 --arch-sparse-feature-size 8 --arch-mlp-top 16-1"
SMALL = f"{MODEL} --mini-batch-size 21 --num-batches 5 --num-indices-per-lookup 7 --verify"
BLOCKS = f"{MODEL} --mini-batch-size 100 --num-batches 4 --num-indices-per-lookup 4 --dense-block 64 --verify"
DELAY = "exp:p=0.3,mean=2ms"
DIVIDED = "--row-wise-above 200 --replicate-below 20"
SLOW = {"SIMULATED_CUDA_DELAY_US": "300"}  # an operation takes up to so much longer


def simulate() -> None:
    """Let this process see the simulated device."""
    from tests.gpu.rank import start

    os.environ["SIMULATED_CUDA_PROTECT"] = "0"  # torch computes in the device's place (see tests.gpu.accelerator)
    start()


def on_gpu(line: str, rank: int, ranks: int) -> GpuWorker:
    from dlrm.gpu.worker import GpuWorker
    from tests.gpu.accelerator import SimulatedAccelerator

    simulate()
    return GpuWorker(parse([*line.split(), "--device", "cuda"]), rank, ranks, SimulatedAccelerator())


# What waits for the device, or makes it wait: not to be called once batches are served.
NOT_IN_THE_LOOP = ("cuMemAlloc_v2", "cuMemFree_v2", "cuMemAllocHost_v2", "cuMemFreeHost", "cuMemHostRegister_v2",
                   "cuStreamSynchronize", "cuEventSynchronize", "cuCtxSynchronize", "cuModuleLoadData",
                   "cuEventCreate", "cuStreamCreateWithPriority")  # fmt: skip


def watched(loop: Callable[..., Iterator[Predictions]]) -> Callable[..., Iterator[Predictions]]:
    def run(predictions: Iterator[Predictions]) -> Iterator[Predictions]:
        before = [simulated.calls(function) for function in NOT_IN_THE_LOOP]
        yield from loop(predictions)
        assert [simulated.calls(function) for function in NOT_IN_THE_LOOP] == before

    return run


def serve(rank: int, ranks: int, store: Store, line: str, runs: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    worker = on_gpu(line, rank, ranks)
    worker._watched = watched(worker._watched)  # type: ignore[method-assign]
    reports = [worker.run(store, f"run {number}", **changes) for number, changes in enumerate(runs)]
    assert simulated.complaints() == 0
    return [{**report.values, "difference": report.difference} for report in reports if report] or None


def run(ranks: int, line: str, *runs: dict[str, Any], target: Any = serve, **options: Any) -> list[dict[str, Any]]:
    """What rank 0 reports of each run."""
    first, *others = run_ranks(target, ranks, line, list(runs) or [{}], **options)
    assert all(result.value is None for result in others)
    for values in first.value:
        assert values["exact"] is True, values["difference"]
        assert 0 < values["largest_error_in_bounds"] < 1
        assert values["max_lead_seen"] <= values["lag"]
    return list(first.value)


def pooled_on_cpu(line: str) -> str:
    """The digest of the pooled vectors of the same run on one CPU."""
    from tests.ranks import store_server

    report = Worker(parse(line.split()), 0, 1).run(store_server(), "on a CPU")
    assert report is not None
    return str(report.values["pooled_sha256"])


def logits(values: list[dict[str, Any]]) -> set[str]:
    return {one["logits_sha256"] for one in values}


def test_bits_depend_neither_on_ranks_nor_on_lags_nor_on_paths() -> None:
    runs = [{"lag": 0}, {"lag": 3, "delay": DELAY, "profile": True}]
    one = run(1, BLOCKS)
    two = run(2, BLOCKS, *runs, {"lag": 1, "arrival_rate": 400.0}, env=SLOW)
    three = run(3, BLOCKS, *runs, env={**SLOW, "BLSRDMA_GPU_PATH": "staged"})
    assert len(logits(one + two + three)) == 1
    assert {values["pooled_sha256"] for values in one + two + three} == {pooled_on_cpu(BLOCKS)}
    assert set(two[0]["bytes_by_path"]) == {"self", "ipc"}
    assert set(three[0]["bytes_by_path"]) == {"self", "staged"}
    assert two[0]["gpu"][0]["steps_ms"] is None
    for gpu in two[1]["gpu"]:
        assert all(spent > 0 for spent in gpu["steps_ms"].values())
        assert gpu["rows"] == gpu["hot_rows"] > 0


@pytest.mark.parametrize(
    "line",
    [
        f"{SMALL} {DIVIDED} --pooling mean --lag 2",
        f"{SMALL} --arch-interaction-op cat --quantize-emb-with-bit 16 --pooling mean --loss-threshold 0.4",
        f"{SMALL} --arch-interaction-itself --quantize-emb-with-bit 8 --mini-batch-size 2",  # a rank without samples
    ],
)
def test_pooling_placement_formats_and_shapes(line: str) -> None:
    run(3, line, env=SLOW)


def serve_both(rank: int, ranks: int, store: Store, lines: str, _: object) -> list[dict[str, Any]] | None:
    found = [serve(rank, ranks, PrefixStore(line, store), line, [{}]) for line in lines.split("|")]
    return [one[0] for one in found if one] or None


def test_rows_that_do_not_fit_stay_on_the_host() -> None:
    line = f"{SMALL} {DIVIDED} --lag 1"
    roomy, tight = run(2, f"{line} | {line} --gpu-memory 76K", target=serve_both)
    assert tight["pooled_sha256"] == roomy["pooled_sha256"]
    assert tight["logits_sha256"] == roomy["logits_sha256"]
    for gpu in tight["gpu"]:
        assert 0 < gpu["hot_rows"] < gpu["rows"]
        assert gpu["host_bytes"] > 0
        assert gpu["table_bytes"] + gpu["window_bytes"] + gpu["batch_bytes"] < 76 << 10


def weigh(batches: Callable[..., Iterator[Batch]]) -> Callable[..., Iterator[Batch]]:
    def weighted(self: Worker, *arguments: Any) -> Iterator[Batch]:
        for batch in batches(self, *arguments):
            random = np.random.default_rng(batch.first)
            drawn = (random.standard_normal(len(some)).astype(np.float32) for some in batch.indices)
            yield replace(batch, weights=tuple(map(torch.from_numpy, drawn)))

    return weighted


def serve_weighted(rank: int, ranks: int, store: Store, line: str, runs: list[dict[str, Any]]) -> Any:
    Worker.batches = weigh(Worker.batches)  # type: ignore[method-assign]
    return serve(rank, ranks, store, line, runs)


def test_weights() -> None:
    run(2, f"{SMALL} {DIVIDED} --quantize-emb-with-bit 16", target=serve_weighted)


def be_the_command(rank: int, ranks: int, store: Store, flags: list[str]) -> int:
    import dlrm.gpu.worker
    from dlrm.__main__ import main
    from tests.gpu.accelerator import SimulatedAccelerator

    simulate()
    dlrm.gpu.worker.open_accelerator = lambda *_: SimulatedAccelerator()  # type: ignore[assignment]
    return main([*flags, "--device", "cuda"])


def test_the_command_tells_of_gpus_and_of_what_was_compared(tmp_path: Path) -> None:
    flags = [*SMALL.split(), "--lag", "1", "--profile", "--json", str(tmp_path / "out.json")]
    zero, one = run_ranks(be_the_command, 2, flags)
    assert zero.value == one.value == 0, zero.output
    assert "of tables (all rows)" in one.output
    said = " ".join(zero.output.replace("│", " ").split())
    assert "rank 1 is on GPU 0, Simulated GPU 0: tables" in said
    assert "every bit of pooled vectors; logits are off float64 by at most" in said
    values = json.loads((tmp_path / "out.json").read_text())
    assert values["settings"]["device"] == "cuda"
    assert set(values["gpu"][1]["steps_ms"]) == {"lookup", "bottom", "interaction", "top"}


@pytest.mark.slow
@pytest.mark.parametrize("path", ["ipc", "staged"])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_the_whole_matrix(ranks: int, bits: int, path: str) -> None:
    line = f"{BLOCKS} --quantize-emb-with-bit {bits}"
    runs = [{"lag": lag, "delay": delay} for lag in (0, 1, 3, 7) for delay in ("none", DELAY)]
    values = run(ranks, line, *runs, env={**SLOW, "BLSRDMA_GPU_PATH": path}, timeout=200)
    assert len(logits(values)) == 1
    assert {one["pooled_sha256"] for one in values} == {pooled_on_cpu(line)}
    tight = run(ranks, f"{line} --pooling mean --row-wise-above 200 --gpu-memory 240K", {"lag": 2}, env=SLOW)
    assert sum(gpu["hot_rows"] for gpu in tight[0]["gpu"]) > 0


# --- what goes wrong


def flip(rank: int, ranks: int, store: Store) -> list[Any] | None:
    worker = on_gpu(SMALL, rank, ranks)
    found = []
    # One byte of rank 1: of where its interaction finds vectors, then of a row.
    for where in ("interaction", "table"):
        address = worker._interaction._addresses[0] if where == "interaction" else worker._on_gpu._memory[0].address
        if rank == 1:
            worker._device.fill(address, 1 if where == "interaction" else 0x3F, 1)
            worker._accelerator.settle()
        report = worker.run(store, where)
        found.append(report and [report.values["exact"], report.difference])
    return found if rank == 0 else None


def test_verification_finds_a_wrong_byte() -> None:
    (exact, difference), (no_more_exact, in_a_row) = run_ranks(flip, 2)[0].value
    assert exact is no_more_exact is False
    assert "logits are outside their bound first at sample 1" in difference
    assert "pooled vectors differ first at sample" in in_a_row
    assert "table 3" in in_a_row


def break_down(rank: int, ranks: int, store: Store, how: str) -> None:
    worker = on_gpu(f"{SMALL} --timeout {0.5 if how == 'hang' else 20}", rank, ranks)
    check = bags.check

    def hang(batch: Batch, *others: Any) -> None:
        check(batch, *others)
        if batch.first == 63:
            simulated.control().simulated_hold(1)

    if rank == ranks - 1:
        if how == "kernel":
            simulated.fail("kernel", 700, 6)
        elif how == "hang":
            worker._accelerator.patience_ns = 10**8  # type: ignore[attr-defined]
            bags.check = hang
        else:
            bags.check = lambda *_: None
            wrong = [
                replace(one, indices=tuple(some + 990 * (table > 2) for table, some in enumerate(one.indices)))
                for one in worker.batches()
            ]
            worker._batches = iter(wrong)
    worker.run(store)


@pytest.mark.parametrize(
    ("how", "ranks", "error", "says"),
    [
        ("kernel", 2, "GpuError", "an illegal memory access"),
        ("hang", 1, "GpuError", "its GPU has not finished it after 0.5 s"),
        ("index", 2, "BagsError", "is not a row of a table of 20 rows"),  # that a check on the host did not find
    ],
)
def test_nobody_hangs_where_a_gpu_fails(how: str, ranks: int, error: str, says: str) -> None:
    *others, last = run_ranks(break_down, ranks, how, check=False, timeout=30, env={"BLSRDMA_CLOSE_TIMEOUT": "0.3"})
    assert last.error is not None
    assert last.error.type == error
    assert says in last.error.message
    for other in others:
        assert other.error is not None
        assert other.error.type == "PeerFailed"
        assert f"rank 1 failed: {error}: " in other.error.message


def refuse(line: str, says: str, error: type[Exception]) -> None:
    with pytest.raises(error, match=says):
        on_gpu(line, 0, 1)


def refuse_all(rank: int, ranks: int, store: Store) -> None:
    from dlrm.gpu.accelerator import open_accelerator

    refuse(f"{SMALL} --dense-block 32", "wanted a multiple of 64 on a GPU", OptionError)
    refuse(f"{SMALL} --window-bytes 64", "messages in GPU memory come whole, and have up to 3360", OptionError)
    refuse(f"{SMALL} --gpu-memory 4K", "a rank needs .* besides its tables .*: the limit is 4.0 K", MemoryLimitExceeded)
    refuse(f"{SMALL} --gpu-memory 9G", "--gpu-memory 9.0 GiB: .* are free", MemoryLimitExceeded)
    if not torch.cuda.is_available():
        with pytest.raises(OptionError, match=r"torch .* cannot use CUDA: install a build that can"):
            open_accelerator(0, tf32=False)
    os.environ["BLSRDMA_MEMORY_LIMIT"] = "1000"
    refuse(f"{SMALL} --gpu-memory 60K", "of page-locked host memory: the limit is 1000 B", MemoryLimitExceeded)


def test_what_does_not_fit_is_refused_before_anything_starts() -> None:
    run_ranks(refuse_all, 1)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--device cuda --input sharded", "--input sharded does not go with --device cuda: only replicated does"),
        ("--device cuda --exchange put", "--exchange put does not go with --device cuda"),
        ("--device cuda --dist-backend gloo", "--dist-backend gloo does not go with --device cuda"),
        ("--device cuda --table-kernel fbgemm --quantize-emb-with-bit 8", "--table-kernel fbgemm does not go"),
        ("--device cuda --dense-kernel onednn", "--dense-kernel onednn does not go"),
        ("--tf32", "want --device cuda"),
        ("--gpu-memory 1G", "want --device cuda"),
        ("--cuda-graphs false", "want --device cuda"),
    ],
)
def test_flags_that_do_not_go_together(flags: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        parse(flags.split())


def command(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dlrm", "--device", "cuda", *flags], capture_output=True, text=True, timeout=300
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so_in_one_line() -> None:
    done = command("--ranks", "2")
    assert done.returncode == 1
    assert done.stderr.startswith("dlrm: --device cuda: ")
    assert len(done.stderr.splitlines()) == 1


# --- on a real GPU


def served(folder: Path, *flags: str) -> dict[str, Any]:
    """The report of a verified run of the command."""
    report = folder / "report.json"
    run_flags = ("--verify", "--dense-block", "64", "--num-batches", "30", "--profile", "--json", str(report))
    done = command(*run_flags, *flags)
    assert done.returncode == 0, done.stderr
    values: dict[str, Any] = json.loads(report.read_text())
    assert values["exact"] is True
    assert 0 < values["largest_error_in_bounds"] < 1
    return values


@pytest.mark.gpu
def test_bits_on_a_real_gpu_depend_neither_on_ranks_nor_on_lags(tmp_path: Path) -> None:
    one, two = served(tmp_path, "--ranks", "1"), served(tmp_path, "--ranks", "2", "--lag", "3")
    assert one["logits_sha256"] == two["logits_sha256"]
    assert one["pooled_sha256"] == two["pooled_sha256"]
    assert one["gpu"][0]["hot_rows"] == one["gpu"][0]["rows"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "flags", ["--cuda-graphs false --gpu-memory 7M", "--tf32 --pooling mean --row-wise-above 5000"]
)
def test_a_real_gpu_with_other_flags(tmp_path: Path, flags: str) -> None:
    values = served(tmp_path, "--ranks", "2", "--lag", "1", *flags.split())
    assert all((gpu["hot_rows"] == gpu["rows"]) == ("--tf32" in flags) for gpu in values["gpu"])
