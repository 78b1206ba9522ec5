"""DLRM on two nodes with two ranks each (see test_hosts): direct stores inside a node and puts over TCP between them,
in one run, bit by bit what one process computes; and every survivor's end when a node is cut off."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.faults.test_hosts import ADDRESS, NOT_PERMITTED, ROOT, _run, nodes

KEEPALIVE_S = 8

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(NOT_PERMITTED), reason=NOT_PERMITTED or "never")]


@contextlib.contextmanager
def dlrm_on(names: list[str], folder: Path, *options: str, keepalive: float):
    """Two ranks of `python -m dlrm` on each node; the output of rank r is in the file r."""
    processes = []
    command = " ".join([sys.executable, "-m", "dlrm", "--lag", "2", "--timeout", "200", *options])
    try:
        for node, name in enumerate(names):
            lines = []
            for local in range(2):
                rank = 2 * node + local
                variables = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": 2 * len(names), "LOCAL_WORLD_SIZE": 2,
                             "MASTER_ADDR": ADDRESS.format(node=0), "MASTER_PORT": 29534}  # fmt: skip
                lines.append(
                    f"env {' '.join(f'{k}={v}' for k, v in variables.items())} {command} > {folder}/{rank} 2>&1 &"
                )
            inside = "mount -t proc proc /proc; mount -t tmpfs tmpfs /dev/shm; " + " ".join(lines) + " wait"
            isolated = ["ip", "netns", "exec", name, "unshare", "--ipc", "--mount", "--pid", "--fork", "--kill-child"]
            environment = {
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "BLSRDMA_KEEPALIVE": str(keepalive),
                "OMP_NUM_THREADS": "1",
                "UCX_NET_DEVICES": "eth0",
                "RES_OPTIONS": "timeout:1 attempts:1",
            }
            processes.append(subprocess.Popen([*isolated, "sh", "-c", inside], env=environment, start_new_session=True))
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def outputs(folder: Path) -> str:
    return "\n".join(f"rank {file.name}: {file.read_text()}" for file in sorted(folder.glob("[0-9]")))


def test_two_nodes_compute_what_one_process_does() -> None:
    with tempfile.TemporaryDirectory() as name, nodes(2) as (names, _):
        folder = Path(name)
        options = ["--verify", "--num-batches", "30", "--mini-batch-size", "128", "--json", f"{folder}/out.json"]
        with dlrm_on(names, folder, *options, keepalive=60) as processes:
            for process in processes:
                process.wait(300)
        assert (folder / "out.json").exists(), outputs(folder)
        values = json.loads((folder / "out.json").read_text())
    assert values["exact"] is True, values
    carried = values[
        "bytes_by_path"
    ]  # each rank has one neighbour and two ranks elsewhere, for all of whom it has as much
    assert 0 < carried["direct"] == carried["self"] == carried["put"] / 2, carried
    (by,) = [each for each in values["bytes_by_transport"] if each not in ("", "mapped")]
    assert "tcp" in by, values["bytes_by_transport"]
    assert not any(memory in by for memory in ("sysv", "posix", "cma")), by


def _crossed(bridge: str) -> int:
    """Bytes that have come from the second node."""
    return int(_run("ip", "netns", "exec", bridge, "cat", "/sys/class/net/to1/statistics/rx_bytes").stdout)


def test_a_node_is_cut_off() -> None:
    """Nobody hangs: all four say which rank of the other node they lost."""
    with tempfile.TemporaryDirectory() as name, nodes(2) as (names, bridge):
        folder = Path(name)
        options = ["--num-batches", "30000", "--mini-batch-size", "64", "--delay", "exp:p=0.9,mean=2ms"]
        with dlrm_on(names, folder, *options, keepalive=KEEPALIVE_S) as processes:
            limit = time.monotonic() + 200
            while _crossed(bridge) < 4e6:  # connecting takes a tenth of that
                assert time.monotonic() < limit, outputs(folder)
                assert all(process.poll() is None for process in processes), outputs(folder)
                time.sleep(0.2)
            _run("ip", "-n", bridge, "link", "set", "to1", "down")
            cut = time.monotonic()
            for process in processes:
                process.wait(120)
            took = time.monotonic() - cut
        said = [(folder / str(rank)).read_text() for rank in range(4)]
    for rank, text in enumerate(said):
        assert "PeerFailed" in text, said
        assert any(f"rank {q} died" in text or f"as rank {q}" in text for q in ((2, 3) if rank < 2 else (0, 1))), said
    assert took < 100, said
