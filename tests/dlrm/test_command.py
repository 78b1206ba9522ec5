"""The command line, as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dlrm.model import Dense
from dlrm.options import parse
from dlrm.tables import Tables

ROOT = Path(__file__).parents[2]
SMALL = ["--arch-mlp-bot", "13-32-16", "--arch-mlp-top", "32-1", "--num-batches", "8", "--mini-batch-size", "50"]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}


def dlrm(*arguments: str, timeout: float = 90) -> subprocess.CompletedProcess[str]:
    return python("-m", "dlrm", *arguments, timeout=timeout)


def python(*arguments: str, timeout: float = 90, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env=environment() | variables,
        check=False,
    )


def living_children(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ended(pids: list[int], within: float) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_a_verified_run_with_all_outputs(tmp_path: Path) -> None:
    out = [tmp_path / name for name in ("out.json", "clicks.npy", "clicks.csv")]
    block = ["--dense-block", "16", *SMALL]
    small = ["--window-bytes", "64"]  # messages larger than a window arrive all the same
    first = dlrm(
        "--ranks",
        "3",
        "--lag",
        "2",
        "--verify",
        "--profile",
        *small,
        "--json",
        str(out[0]),
        "--predictions",
        str(out[1]),
        *block,
    )
    assert first.returncode == 0, first.stderr
    assert "every bit" in first.stdout
    values = json.loads(out[0].read_text())
    assert values["exact"] is True
    assert (values["ranks"], values["lag"], values["batches"], values["samples"]) == (3, 2, 8, 400)
    assert set(values["latency_ms"]) == {"p50", "p95", "p99"}
    assert len(values["wait_ms"]) == 3
    for wall, processor, seconds in zip(
        values["phases_ms"], values["phases_cpu_ms"], values["cpu_seconds"], strict=True
    ):
        assert wall.keys() == processor.keys()
        assert 0 < processor["dense"] <= sum(processor.values()) <= 1e3 * seconds + 20  # which ticks
    assert len(values["pooled_sha256"]) == len(values["logits_sha256"]) == 64
    assert values["auc"] is not None

    second = dlrm("--json", "-", "--predictions", str(out[2]), *block)
    assert second.returncode == 0, second.stderr
    alone = json.loads(second.stdout)
    assert alone["ranks"] == 1
    assert alone["exact"] is alone["pooled_sha256"] is alone["phases_cpu_ms"] is None
    clicks = np.load(out[1])
    assert clicks.dtype == np.float32
    table = np.loadtxt(out[2], delimiter=",", skiprows=1)
    np.testing.assert_array_equal(table[:, 0], np.arange(400))
    np.testing.assert_array_equal(table[:, 1].astype(np.float32), clicks)


def test_torchrun_and_a_checkpoint(tmp_path: Path) -> None:
    shape = parse(["--arch-embedding-size", "30-40-50", "--arch-mlp-bot", "4-16", "--arch-mlp-top", "8-1"]).shape(
        (30, 40, 50)
    )
    modules = (Tables(shape, range(3), 77), Dense(shape, 77))
    state = {name: tensor for module in modules for name, tensor in module.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 0}, tmp_path / "model.pt")
    model = ["--arch-embedding-size=30-40-50", "--arch-mlp-bot=4-16", "--arch-mlp-top=8-1", "--num-batches=5"]
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "dlrm", "--lag", "1", "--verify"]
    command += ["--load-model", str(tmp_path / "model.pt"), "--json", str(tmp_path / "out.json"), *model]
    done = python(*command)
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "out.json").read_text())
    assert (values["exact"], values["ranks"], values["auc"]) == (True, 2, None)


def test_a_malformed_file_ends_all_ranks_with_one_line_each(tmp_path: Path) -> None:
    path = tmp_path / "bad.tsv"
    path.write_text("1\tx\n")
    done = dlrm("--ranks", "2", "--raw-data-file", str(path))
    assert done.returncode == 1
    assert f"rank 0: DataError: {path}, line 1, field 2 (I1): 'x' is not an integer" in done.stderr
    assert "RankFailed: rank" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--delay never", "dlrm: --delay 'never' is not understood"),
        ("--lag=-1", "--lag: -1 is less than 0"),
        ("--qr-flag", "QR embeddings"),
    ],
)
def test_wrong_flags_are_refused_before_any_rank_starts(line: str, says: str) -> None:
    done = dlrm("--ranks", "4", *line.split())
    assert done.returncode == 2
    assert says in done.stderr


def test_ranks_that_contradict_torchrun_are_refused() -> None:
    done = python("-m", "dlrm", "--ranks", "3", RANK="0", WORLD_SIZE="2")
    assert done.returncode == 2
    assert "--ranks 3, but WORLD_SIZE is 2" in done.stderr


def long_run() -> tuple[subprocess.Popen[str], list[int]]:
    """A launcher with three ranks that would run for minutes, and its ranks, all well under way."""
    arguments = ["--ranks", "3", "--lag", "1", "--num-batches", "20000", "--delay", "rotate:every=1,time=20ms"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "dlrm", *arguments, "--print-freq", "5", "--mini-batch-size", "8"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    assert launcher.stderr is not None
    for text in launcher.stderr:
        if "batch 5:" in text:
            break
    ranks = living_children(launcher.pid)
    assert len(ranks) == 3
    return launcher, ranks


def test_a_killed_rank_is_named_and_the_others_end() -> None:
    launcher, ranks = long_run()
    began = time.monotonic()
    by_rank = {}
    for pid in ranks:
        variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        by_rank[next(int(text[5:]) for text in variables if text.startswith(b"RANK="))] = pid
    os.kill(by_rank[1], signal.SIGKILL)
    _, errors = launcher.communicate(timeout=30)
    assert launcher.returncode == 1
    assert "RankFailed: rank 1 was ended by SIGKILL" in errors
    assert "rank 0: PeerFailed" in errors or "rank 2: PeerFailed" in errors
    assert time.monotonic() - began < 10
    assert ended(ranks, 5)


@pytest.mark.parametrize(
    "how",
    [
        signal.SIGKILL,
        signal.SIGTERM,
        pytest.param(signal.SIGINT, marks=pytest.mark.slow),
    ],
)
def test_no_rank_outlives_the_launcher(how: signal.Signals) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", "from blsrdma.spawn import launch; launch('tests.dlrm.sleeper', [], 3)"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment(),
    )
    assert launcher.stderr is not None
    for _ in range(3):
        assert launcher.stderr.readline() == "here\n"
    ranks = living_children(launcher.pid)
    assert len(ranks) == 3
    launcher.send_signal(how)
    launcher.communicate(timeout=30)
    assert launcher.returncode != 0
    assert ended(ranks, 5)
