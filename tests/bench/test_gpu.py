"""`python -m bench gpu`: its code on the simulated device, where no number means anything, and its tables."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import bench.rank
from bench.control import ADDRESS
from bench.gpu import command, dlrm, exchange, lookup, lookup_peers, mps, report, tune
from bench.gpu.effort import Effort, Work
from bench.launchers import Unavailable
from bench.team import Team
from blsrdma.gpu.device import unavailable
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[2]
TOY = Effort(
    prepare="tests.bench.gpu_device:simulate", repeat=2, copy_bytes=1 << 14, rows=60, tables=2, dim=8, pooling=3,
    samples=12, block=501, draws=("zipf:s=1.05",), hot_shares=(0.7,), tier_rows=60, kernel_ms=0.01, ranks=(2,),
    sizes=(4096,), lags=(0, 1), block_seconds=0.001, model_dim=8, bottom="8", top="8-1", dlrm_bytes=1 << 14,
    batch=32, batches=6, lag=1,
    delay="exp:p=0.5,mean=1ms", runs=2,
)  # fmt: skip


def be_a_rank(rank: int, ranks: int, store: Any, address: str, more: dict[str, str]) -> None:
    """`python -m bench.rank bls`."""
    os.environ.update(more, **{ADDRESS: address})
    sys.argv = ["rank", "bls"]
    bench.rank.main()


class Forked(Team):
    """A team whose ranks start in no time, as those of tests.ranks."""

    def __init__(self, ranks: int, runtime: str = "bls", more: dict[str, str] | None = None) -> None:
        if runtime != "bls":
            raise Unavailable(f"no {runtime} in this test")
        self.runtime, self.ranks, self.versions = runtime, ranks, {}
        self._lines, self._processes = [], []
        self._folder = tempfile.TemporaryDirectory(prefix="bench-")
        address = str(Path(self._folder.name) / "control")
        self._log = Path(self._folder.name) / "log"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(address)
        self._listener.listen(ranks)
        arguments: dict[str, Any] = {"env": {"GLOO_SOCKET_IFNAME": "lo"}, "check": False}
        self._ranks = threading.Thread(target=run_ranks, args=(be_a_rank, ranks, address, more or {}), kwargs=arguments)
        self._ranks.start()

    def _end(self) -> None:
        super()._end()
        self._ranks.join(30)
        assert not self._ranks.is_alive()


@pytest.fixture(autouse=True)
def _forked(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in (lookup, exchange, dlrm):
        monkeypatch.setattr(part, "team", Forked)
    monkeypatch.setattr(mps, "COMMAND", "no-such-command")


def quiet(_: str) -> None: ...


def kept() -> tuple[list[Any], Any]:
    seen: list[Any] = []
    return seen, lambda found: seen.append(json.loads(json.dumps(found)))


def options(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"parts": [], "json": None, "document": None, "markdown": True, **given})


def made_up(seconds: float = 1.0) -> dict[str, Any]:
    """Parts with round numbers: a copy reaches 1000 GB/s."""
    facts = {"date": "today", "commit": "abc", "cpu": "a CPU", "cores": 4, "busy_before": 0.0}
    card = {"name": "a GPU", "total_bytes": 80 << 30, "driver": 13000}
    work = {"tables": 26, "rows": 1000, "dim": 128, "pooling": 20, "samples": 8192, "draw": "zipf:s=1.05"}
    common = {"environment": facts, "device": card, "seconds": 9.0}
    case = {
        "copy_gbs": [1000.0] * 3, "ms": {"blsrdma": [1.0 * seconds] * 3, "torch, one over all": [2.0] * 3},
        "skipped": {"FBGEMM TBE": "ModuleNotFoundError: No module named 'fbgemm_gpu'"}, "must_bytes": 8 * 10**8,
        "gathered_bytes": 2 * 10**9, "work": work,
    }  # fmt: skip
    tier = {"share": 0.9, "hot": 0.91, "hot_rows": 10, "cold_bytes": 1 << 30, "cold_read": 10**8, "verified": 1}
    run = {
        "ranks": 2, "mps": False, "bytes": 16 << 20, "copy_gbs": [1000.0],
        "ms": {"ipc 0": [0.1 * seconds] * 3, "ipc 4": [0.2] * 3, "staged 4": [1.0] * 3, "gloo": [0.6] * 3},
        "facts": {"ipc 0": {"paths": ["ipc"]}, "staged 4": {"paths": ["staged"]}, "gloo": {}}, "checked": 1,
    }  # fmt: skip
    row = {"samples_per_s": 1e6, "p99": 2.0, "batches": 10, "digest": None, "slept_ms": [], "lag": 4}
    late = [[4.0] + [0.0] * 9, [0.0] * 9 + [4.0]]  # of two ranks: one at the start, one at the end
    runs = {
        "dense alone": [{**row, "ms": 0.5}], "lookups and exchange alone": [{**row, "ms": 1.0}],
        "whole, lag 0": [{**row, "ms": 1.5, "lag": 0}], "whole, lag 4": [{**row, "ms": 1.05 * seconds}],
        "delayed, lag 0": [{**row, "ms": 2.53, "lag": 0, "slept_ms": late}],
        "delayed, lag 4": [{**row, "ms": 1.6 * seconds**2, "slept_ms": late}],
    }  # fmt: skip
    return {
        "lookup": {**common, "cases": {"zipf:s=1.05": case}, "tiers": {
            "tiers": [tier], "ms": {"all": [1.0], "0.9": [2.0]}, "host_gbs": [100.0], "work": work}},
        "exchange": {**common, "runs": [run], "skipped": {"MPS": "there is none"},
                     "nccl": {"works": False, "why": "Duplicate GPU detected"}},
        "dlrm": {**common, "ranks": 2, "rows": [5, 6], "dim": 128, "runs": runs, "skipped": {}, "mps": False,
                 "batch": 64, "batches": 10, "lag": 4, "delay": "exp:p=0.1,mean=2ms",
                 "looked": {"whole, lag 4": {"steps_ms": {"pool": 0.25}}}},
    }  # fmt: skip


def rows(table: Any) -> dict[str, list[str]]:
    return {row[0]: list(row[1:]) for row in table.rows}


def test_goals_are_told_in_words() -> None:
    good = rows(report.goals(made_up()))
    assert good["pooled lookup, zipf: bytes that must move / copy"] == [">= 0.8", "0.80", "reached"]
    assert good["pooled lookup: speed / FBGEMM TBE"][-1] == "not measured: FBGEMM is not installed"
    where = "exchange, 2 ranks, 16 MiB per pair, without MPS"  # 2 x 2 x 16 MiB in 0.1 ms
    assert good[f"{where}: bandwidth / copy"] == [">= 0.6", "0.67", "reached"]
    assert good[f"{where}: speed / gloo"] == [">= 5", "6.00", "reached"]
    assert good["DLRM: iteration / the larger of its halves alone"] == ["<= 1.1", "1.05", "reached"]
    assert good["DLRM, delayed: iteration / model at that lag"] == ["<= 1.15", "1.10", "reached"]  # 16 of 14.5 ms
    bad = rows(report.goals(made_up(1.3)))
    assert [row[-1] for row in bad.values()].count("missed") == 5
    assert {row[-1] for row in rows(report.goals({})).values()} == {"not measured"}


def test_tables() -> None:
    parts = made_up()
    texts = [table.markdown() for table in report.tables(parts)]
    assert "| zipf:s=1.05 | blsrdma | 1.000 ±0% | 800 | 0.80 | 2,000 | 2.00 |" in texts[0]
    assert "| zipf:s=1.05 | torch, one over all | 2.000 ±0% | 400 | 0.40 | 1,000 | 1.00 | 2.0 (2.0–2.0) |" in texts[0]
    assert "| 91.0% | 10 | 1.0 GiB | 2.000 ±0% | 2.0 (2.0–2.0) | 50.0 | 0.50 |" in texts[1]
    assert "| 16.0 MiB | 100 ±0% | 200 ±0% | 1,000 ±0% | 600 ±0% | 0.671 (ipc, lag 0) | 6.0 (6.0–6.0) |" in texts[2]
    assert "| whole, lag 4 | 1,000,000 ±0% | 2.00 | 1.050 | 1.05 (1.05–1.05) |  |" in texts[3]
    assert "| delayed, lag 0 | 1,000,000 ±0% | 2.00 | 2.530 | 2.5 (2.5–2.5) | 1.10 |" in texts[3]  # 25.3 of 23 ms
    assert "ms per iteration of whole, lag 4: pool 0.250" in texts[3]
    said = report.about(parts)
    assert "NCCL between ranks on one GPU is not measurable: Duplicate GPU detected" in said
    assert "left out: MPS: there is none" in said
    assert "lookup: today, commit abc, a GPU (80.0 GiB, CUDA 13.0), a CPU, 4 cores; took 9 s" in said
    assert len(report.tables({})) == 1


def test_lookups() -> None:
    seen, keep = kept()
    found = lookup.measure(TOY, quiet, keep)
    case = found["cases"]["zipf:s=1.05"]
    assert case["verified"] > 0 and case["lookups"] == 72 and 0 < case["distinct"] <= 72
    assert len(case["ms"]["blsrdma"]) == len(case["copy_gbs"]) == 2
    assert "has no CUDA here" in case["skipped"]["torch, a bag per table"] and "FBGEMM TBE" in case["skipped"]
    (tier,) = found["tiers"]["tiers"]
    assert 0.5 < tier["hot"] < 1 and 0 < tier["hot_rows"] < 60 and tier["verified"] > 0
    assert set(found["tiers"]["ms"]) == {"all", "0.7"}
    assert seen[0]["cases"]


@pytest.mark.parametrize("fused", [False, True])
def test_torch_pools_the_same_bags(monkeypatch: pytest.MonkeyPatch, fused: bool) -> None:
    """On the CPU, where what it is given is a GPU's."""
    import torch

    def view(at: Any, shape: tuple[int, ...], dtype: Any) -> torch.Tensor:
        assert at.dtype == dtype
        return torch.from_numpy(at.reshape(-1)[: math.prod(shape)].reshape(shape))

    monkeypatch.setattr(lookup_peers, "view", view)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "ExternalStream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    work, random = Work(rows=9, tables=3, dim=4, pooling=2, samples=5, block=0), np.random.default_rng(1)
    rows = random.standard_normal((3, 9, 4), np.float32)
    batches = []
    for _ in range(2):
        indices = random.integers(0, 9, (3, 10))
        fused_indices = indices + 9 * np.arange(3)[:, None]
        batches.append(SimpleNamespace(at_indices=indices, at_fused=fused_indices, at_offsets=np.arange(0, 31, 2)))
    launch = lookup_peers.torch_bags(0, work, rows, batches, fused=fused)
    for i in range(3):
        wanted = np.stack([rows[t][batches[i % 2].at_indices[t]].reshape(5, 2, 4).sum(1) for t in range(3)])
        got = launch(i)
        np.testing.assert_allclose(got.reshape(3, 5, 4) if fused else torch.stack(got), wanted, rtol=1e-6, atol=1e-6)


def test_exchanges() -> None:
    seen, keep = kept()
    found = exchange.measure(TOY, quiet, keep)
    (run,) = found["runs"]
    assert {"ipc 0", "ipc 1", "staged 0", "staged 1", "gloo"} <= set(run["ms"])
    assert all(len(samples) == 2 for samples in run["ms"].values())
    assert run["facts"]["ipc 1"]["paths"] == ["ipc"] and run["facts"]["staged 0"]["paths"] == ["staged"]
    assert run["checked"] >= 2 * 3 * 4096 * 2 * 5  # before and after, iterations, bytes, ranks, systems
    assert not found["nccl"]["works"] and found["nccl"]["why"]
    assert found["skipped"]["MPS"] == "there is no no-such-command here"
    assert seen[-1]["runs"]


def test_dlrm() -> None:
    effort = replace(TOY, prepare="tests.bench.gpu_device:simulate_torch", runs=1)
    found = dlrm.measure(effort, quiet, lambda _: None)
    assert set(found["runs"]) == {entry.name for entry in dlrm.entries(TOY)}
    assert min(run["ms"] for runs in found["runs"].values() for run in runs) > 0
    assert {run["digest"] for run in found["looked"].values()} and len(found["looked"]) == 2
    assert all(spent > 0 for run in found["looked"].values() for spent in run["steps_ms"].values())
    (delayed,) = (runs for name, runs in found["runs"].items() if name == "delayed, lag 1")
    assert len(delayed[0]["slept_ms"]) == 2 and len(delayed[0]["slept_ms"][0]) == 6
    assert max(map(max, delayed[0]["slept_ms"])) > 0
    assert set(delayed[0]["paths"]) == {"self", "ipc"}
    assert report.over_model(found, "delayed, lag 1")


def test_rows_are_scaled() -> None:
    rows_ = dlrm.scaled(8 << 30, 128)
    assert len(rows_) == 26 and 0.8 * (8 << 30) < sum(rows_) * 512 <= 8 << 30
    assert rows_[5] == 3 and rows_[0] == rows_[19]
    assert dlrm.scaled(1 << 50, 128) == dlrm.ROWS


def test_a_part_that_fails_does_not_stop_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(*_: Any) -> Any:
        raise command.TeamFailed("rank 1 is gone")

    def working(_effort: Effort, _report: Any, keep: Any) -> Any:
        keep({"half": True})
        written.append(path.read_text())
        return made_up()["exchange"]

    written: list[str] = []
    monkeypatch.setattr(command.environment, "busy_cores", lambda: 0.0)
    monkeypatch.setattr(command, "_PARTS", {"lookup": failing})
    assert command.measure(options(parts=["lookup"]), Effort()) == 1
    told = capsys.readouterr()
    assert "lookup failed: rank 1 is gone" in told.err and not told.out  # nothing is published
    path = tmp_path / "out" / "gpu.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"parts": {"dlrm": made_up()["dlrm"]}}))  # of an earlier run
    monkeypatch.setattr(command, "_PARTS", {"lookup": failing, "exchange": working})
    assert command.measure(options(parts=["lookup", "exchange"], json=path), Effort()) == 1
    told = capsys.readouterr()
    assert "lookup failed: rank 1 is gone" in told.err
    assert "All-to-all of 2 ranks" in told.out and "DLRM of MLPerf" in told.out
    assert json.loads(written[0])["parts"]["exchange"]["half"]  # before it was done
    assert set(json.loads(path.read_text())["parts"]) == {"exchange", "dlrm"}


def test_what_there_is_is_shown_when_time_is_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def ended(_effort: Effort, _report: Any, keep: Any) -> Any:
        keep({**made_up()["dlrm"], "environment": None})
        sys.exit(143)

    monkeypatch.setattr(command.environment, "busy_cores", lambda: 0.0)
    monkeypatch.setattr(command, "_PARTS", {"dlrm": ended})
    with pytest.raises(SystemExit):
        command.measure(options(parts=["dlrm"]), Effort())
    assert "DLRM of MLPerf" in capsys.readouterr().out


def test_a_simulated_gpu_is_never_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tmp_path / "gpu.md"
    document.write_text("<!-- bench gpu -->\n<!-- end gpu -->\n")
    before = document.read_text()
    monkeypatch.setattr(command.environment, "busy_cores", lambda: 0.0)
    for name, published in (("Simulated GPU 0", False), ("a GPU", True)):
        part = {**made_up()["exchange"], "device": {"name": name, "total_bytes": 1, "driver": 13000}}
        monkeypatch.setattr(command, "_PARTS", {"exchange": lambda *_, part=part: part})
        status = command.measure(options(parts=["exchange"], document=(document, "gpu")), Effort())
        assert (status == 0) == published == (document.read_text() != before)
        assert ("mean nothing" in capsys.readouterr().err) != published


def test_mps_that_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refusing = tmp_path / "mps"
    refusing.write_text("#!/bin/sh\necho no permission >&2\nexit 1\n")
    refusing.chmod(0o755)
    monkeypatch.setattr(mps, "COMMAND", str(refusing))
    with pytest.raises(mps.NoMps, match="no permission"), mps.served():
        pass


def test_the_model_goes_on_without_mps_where_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def served() -> Iterator[dict[str, str]]:
        yield {"CUDA_MPS_PIPE_DIRECTORY": "here"}

    def measured(_effort: Effort, environment: dict[str, str], skipped: dict[str, str], *_: Any) -> Any:
        if environment:
            raise command.TeamFailed("bls with 2 ranks: run failed:\n  rank 0: GpuError: no server\nmore")
        return skipped

    monkeypatch.setattr(mps, "served", served)
    monkeypatch.setattr(dlrm, "_measure", measured)
    told: list[str] = []
    why = "bls with 2 ranks: run failed: rank 0: GpuError: no server"
    assert dlrm.measure(TOY, told.append, lambda _: None) == {"MPS": why}
    assert told == [f"dlrm: without MPS: {why}"]


def test_mps_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = tmp_path / "mps"
    server.write_text(f'#!/bin/sh\n[ "$1" = -d ] && echo "$CUDA_MPS_PIPE_DIRECTORY" || cat >{tmp_path}/said\n')
    server.chmod(0o755)
    monkeypatch.setattr(mps, "COMMAND", str(server))
    with mps.served() as environment:
        assert set(environment) == {"CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"}
        assert not (tmp_path / "said").exists()
    assert (tmp_path / "said").read_text() == "quit\n"


@pytest.mark.skipif(not unavailable(), reason="there is a GPU here: ci/gpu runs it")
def test_without_a_gpu_the_commands_end_at_once() -> None:
    for words in ([sys.executable, "-m", "bench", "gpu"], ["bash", "ci/gpu"], ["bash", "ci/gpu", "lookup", "dlrm"]):
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
        assert done.stdout.count("\n") == 1 and "nothing ran: " in done.stdout and not done.stderr
    refused = subprocess.run(["bash", "ci/gpu", "looup"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and "looup" in refused.stderr


def test_an_unknown_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(options(parts=["lookup", "looup"])) == 2
    assert "no part 'looup'" in capsys.readouterr().err


def test_tuning() -> None:
    """Every way gives the same sums, and has its line."""
    run_ranks(be_tuned, 1)


def be_tuned(rank: int, ranks: int, store: Any) -> None:
    tune.WAYS = (tune.WAYS[0], *tune.WAYS[-4:], tune.Way("other macros", {"POOL_AHEAD": 2, "POOL_LOAD": "__ldcg"}))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert tune.main(["--rows", "50"], TOY) == 0
    lines = out.getvalue().splitlines()
    assert "Simulated GPU" in lines[0]
    assert [line.split("  ")[0] for line in lines[2:]] == [*(way.name for way in tune.WAYS), "interaction, 26 tables"]
    assert all("of a copy" in line for line in lines[2:])
