"""--dist-backend: the same engine over another library's all-to-all gives the same bits, and says so when it fails."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dlrm import collect, transports
from dlrm.collective import Collective
from dlrm.errors import CollectiveFailed, OptionError
from dlrm.options import parse
from dlrm.worker import Worker
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
SMALL = "--arch-mlp-bot 13-32-16 --arch-mlp-top 32-1 --mini-batch-size 50 --num-batches 8 --max-ind-range 500 --verify"


def _runs(rank: int, ranks: int, store: Any, backends: list[str], line: str) -> list[dict[str, Any]] | None:
    worker = Worker(parse(line.split()), rank, ranks)
    reports = [worker.run(store, name, dist_backend=name) for name in backends]
    return [report.values for report in reports if report] or None


@pytest.mark.parametrize(
    ("ranks", "line"),
    [
        (2, "--lag 2"),
        (3, "--lag 0 --replicate-below 30 --row-wise-above 400"),
        pytest.param(4, "--lag 1 --mini-batch-size 3 --arch-embedding-size 10-20-30", marks=pytest.mark.slow),
    ],
)
def test_the_same_bits(ranks: int, line: str) -> None:
    backends = ["bls", "gloo", "torch-bls"]
    found = run_ranks(_runs, ranks, backends, f"{SMALL} {line}", timeout=180)[0].value
    assert [values["settings"]["dist_backend"] for values in found] == backends
    assert len({(values["pooled_sha256"], values["logits_sha256"]) for values in found}) == 1
    assert all(values["exact"] is True for values in found)
    ours, *others = (sum(values["bytes_by_path"].values()) for values in found)
    assert others == [ours, ours]
    assert set(found[1]["bytes_by_path"]) == {"gloo"}


def _collective(rank: int, ranks: int, store: Any) -> None:
    with transports.opened("gloo", store, rank, ranks, 30.0) as make:
        two = Collective(make(2, 0), 2, 30.0)
        deliveries = []
        for i in range(10):
            assert two.begin() == two.iteration == i
            counts = [(rank + q + i) % 4 for q in range(ranks)]  # the same from q as to q
            deliveries.append(two.post(torch.full((sum(counts),), 10.0 * i + rank), counts, expected=counts))
            if i > 2:
                assert deliveries[i - 3].ready() and deliveries[i - 3].sent()  # else the bound would not hold
        for i, delivery in enumerate(deliveries):
            for q, part in enumerate(delivery.wait()):
                assert part.tolist() == [10.0 * i + q] * ((rank + q + i) % 4)
        assert two.stats()["peers"][rank]["bytes"] == 4 * sum((2 * rank + i) % 4 for i in range(10))
        meet = Collective(make(0, 0), 0, 30.0)
        collect.barrier(meet)
        parts = collect.gather(meet, np.arange(300_000 * rank))
        assert (parts is None) == (rank > 0)
        if parts is not None:
            assert [len(part) for part in parts] == [300_000 * q for q in range(ranks)]
            assert (parts[-1] == np.arange(300_000 * (ranks - 1))).all()
        collect.barrier(meet)


def test_it_is_an_exchange_of_any_sizes() -> None:
    run_ranks(_collective, 3)


def _dead(rank: int, ranks: int, store: Any) -> None:
    with transports.opened("gloo", store, rank, ranks, 5.0) as make:
        one = Collective(make(0, 0), 0, 5.0)
        collect.barrier(one)
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(CollectiveFailed, match=r"^gloo, rank 0, iteration \d: failed after [0-9.]+ s: "):
            for _ in range(3):
                collect.barrier(one)


def test_a_failure_names_the_library_and_the_iteration() -> None:
    run_ranks(_dead, 2, expect_exit={1: -signal.SIGKILL})


def test_what_cannot_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PMI_RANK", "OMPI_COMM_WORLD_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(OptionError, match=r"--input sharded wants --dist-backend bls, not gloo"):
        parse("--input sharded --dist-backend gloo".split())
    gpus = torch.cuda.device_count()
    with pytest.raises(OptionError, match=f"a GPU for each rank: {gpus + 1} ranks, {gpus} GPUs"):
        transports.refuse("nccl", gpus + 1)
    monkeypatch.setattr("dlrm.mpiexec.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"wants mpi4py: pip install 'blsrdma\[mpi\]'"):
        transports.refuse("mpi", 2)


@pytest.mark.skipif(not find_spec("mpi4py"), reason="no mpi4py: pip install '.[mpi]'")
@pytest.mark.slow
def test_over_mpi() -> None:
    digests = set()
    for backend in ("mpi", "bls"):
        line = f"-m dlrm --ranks 2 --lag 2 --dist-backend {backend} {SMALL}"
        done = subprocess.run(
            [sys.executable, *line.split()], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "every bit" in done.stdout
        digests.add(re.sub(r"[^0-9a-f]", "", done.stdout.split("logits")[1].split("exact")[0]))
    assert len(digests) == 1 and len(digests.pop()) == 64
    line = f"-m dlrm --ranks 2 --dist-backend mpi --load-model nowhere.pt {SMALL}"
    done = subprocess.run(
        [sys.executable, *line.split()], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False
    )
    assert done.returncode != 0
    assert "nowhere.pt" in done.stderr
