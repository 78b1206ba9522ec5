"""Several hosts on one machine: a node has its own network, IPC, mount and PID namespaces, over veth.

Between nodes bytes go by TCP and liveness by heartbeats, inside a node by direct stores and pidfds; a link that is cut
ends in an error on every rank, in time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "10.77.{node}.1"  # of the namespaces that this test makes, and of nothing else
KEEPALIVE_S = {"run": 60, "cut": 4}  # long where nobody dies: a busy machine must not look like a death

RANK = """
import json, os, sys, time
import numpy as np
from blsrdma import Exchange
from blsrdma.errors import BlsrdmaError

mode, folder = sys.argv[1:]
said = {"rank": int(os.environ["RANK"])}
try:
    with Exchange(lag=1, window_bytes=4096, timeout=100, close_timeout=2) as exchange:
        said["paths"] = [(p["path"], p["transport"]) for p in exchange.stats()["peers"]]
        rounds = 0
        began = time.monotonic()
        while mode == "cut" or rounds < 200:
            counts = [(exchange.rank + q + rounds) % 7 for q in range(exchange.world_size)]
            with exchange.post(np.full(sum(counts), exchange.rank, np.int64), counts) as received:
                for q, message in enumerate(received):
                    assert len(message) == (exchange.rank + q + rounds) % 7 and (message == q).all()
            rounds += 1
            if rounds == 100:
                open(f"{folder}/running-{exchange.rank}", "w").close()
            if mode == "cut":
                time.sleep(0.001)
        said["rounds"] = rounds
except BlsrdmaError as error:
    said |= {"error": type(error).__name__, "text": str(error), "at": time.time()}
    said["failed"] = getattr(error, "rank", None)
with open(f"{folder}/said-{said['rank']}.tmp", "w") as file:
    json.dump(said, file)
os.rename(file.name, f"{folder}/said-{said['rank']}")
"""


def _run(*command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=check, capture_output=True, text=True, timeout=20)


def _permitted() -> str:
    """Why namespaces cannot be made here; empty if they can."""
    for tool in ("ip", "unshare"):
        if not shutil.which(tool):
            return f"no {tool}"
    name = f"bls-try-{os.getpid()}"
    made = _run("ip", "netns", "add", name, check=False)
    if made.returncode:
        return f"network namespaces are not permitted: {made.stderr.strip()}"
    tried = _run("ip", "netns", "exec", name, "unshare", "--ipc", "--mount", "--pid", "--fork", "true", check=False)
    _run("ip", "netns", "del", name, check=False)
    return f"IPC, mount and PID namespaces are not permitted: {tried.stderr.strip()}" if tried.returncode else ""


NOT_PERMITTED = _permitted()
pytestmark = pytest.mark.skipif(bool(NOT_PERMITTED), reason=NOT_PERMITTED or "never")


@contextlib.contextmanager
def nodes(count: int):
    """Names of `count` network namespaces that reach each other through a bridge in one more."""
    names = [f"bls{os.getpid()}-{node}" for node in range(count)]
    bridge = f"bls{os.getpid()}-b"
    try:
        for name in [*names, bridge]:
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", bridge, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", bridge, "link", "set", "br0", "up")
        for node, name in enumerate(names):
            _run("ip", "-n", bridge, "link", "add", f"to{node}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _run("ip", "-n", bridge, "link", "set", f"to{node}", "master", "br0", "up")
            _run("ip", "-n", name, "addr", "add", ADDRESS.format(node=node) + "/16", "dev", "eth0")
            _run("ip", "-n", name, "link", "set", "eth0", "up")
        yield names, bridge
    finally:
        for name in [*names, bridge]:
            _run("ip", "netns", "del", name, check=False)


@contextlib.contextmanager
def ranks_on(names: list[str], mode: str, folder: Path):
    """Two ranks on each node, in fresh IPC, mount and PID namespaces; rank 0 hosts the store."""
    script = folder / "rank.py"
    script.write_text(RANK)
    world = 2 * len(names)
    processes = []
    try:
        for node, name in enumerate(names):
            lines = []
            for local in range(2):
                torchrun = {"RANK": 2 * node + local, "LOCAL_RANK": local, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": 2,
                            "MASTER_ADDR": ADDRESS.format(node=0), "MASTER_PORT": 29533}  # fmt: skip
                assignments = " ".join(f"{key}={value}" for key, value in torchrun.items())
                lines.append(f"env {assignments} {sys.executable} {script} {mode} {folder} &")
            # Its own /proc and /dev/shm, as on a host of its own.
            inside = "mount -t proc proc /proc; mount -t tmpfs tmpfs /dev/shm; " + " ".join(lines) + " wait"
            command = ["ip", "netns", "exec", name, "unshare", "--ipc", "--mount", "--pid", "--fork", "--kill-child",
                       "sh", "-c", inside]  # fmt: skip
            # One kernel, one boot id: UCX takes all nodes for one host, and would try each one's loopback device.
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "BLSRDMA_KEEPALIVE": str(KEEPALIVE_S[mode]),
                           "UCX_NET_DEVICES": "eth0", "RES_OPTIONS": "timeout:1 attempts:1"}  # fmt: skip
            processes.append(
                subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)
            )
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def _wait_for(folder: Path, pattern: str, count: int, seconds: float) -> None:
    limit = time.monotonic() + seconds
    while len(list(folder.glob(pattern))) < count:
        said = [file.read_text() for file in folder.glob("said-?")]
        assert time.monotonic() < limit, f"only {sorted(p.name for p in folder.iterdir())} after {seconds} s: {said}"
        assert pattern.startswith("said") or not said, f"ended before they all ran: {said}"
        time.sleep(0.05)


def _said(folder: Path, count: int) -> list[dict]:
    return [json.loads((folder / f"said-{rank}").read_text()) for rank in range(count)]


def _check_paths(said: list[dict]) -> None:
    for mine in said:
        for peer, (path, transport) in enumerate(mine["paths"]):
            if peer == mine["rank"]:
                assert path == "self"
            elif peer // 2 == mine["rank"] // 2:
                assert path == "direct", said
            else:  # shared memory would reach across network namespaces: the IPC namespaces keep it out
                assert path == "put", said
                assert "tcp" in transport, said
                assert "sysv" not in transport, said


def test_two_nodes_with_two_ranks_each() -> None:
    with tempfile.TemporaryDirectory() as name, nodes(2) as (names, _), ranks_on(names, "run", Path(name)):
        _wait_for(Path(name), "said-?", 4, 120)
        said = _said(Path(name), 4)
    assert [mine.get("rounds") for mine in said] == [200] * 4, said
    _check_paths(said)


@pytest.mark.slow
def test_a_link_is_cut() -> None:
    with tempfile.TemporaryDirectory() as name, nodes(2) as (names, bridge), ranks_on(names, "cut", Path(name)):
        folder = Path(name)
        _wait_for(folder, "running-?", 4, 120)
        _run("ip", "-n", bridge, "link", "set", "to1", "down")
        cut = time.time()
        _wait_for(folder, "said-?", 4, 40)
        said = _said(folder, 4)
    _check_paths(said)
    for mine in said:
        assert mine["error"] == "PeerFailed", said
        assert mine["failed"] // 2 != mine["rank"] // 2, said  # nobody blames the neighbour
        assert "no sign of life" in mine["text"] or "connection is lost" in mine["text"], said
        assert mine["at"] - cut < KEEPALIVE_S["cut"] + 4, said


@pytest.mark.slow
def test_a_whole_node_dies() -> None:
    with tempfile.TemporaryDirectory() as name, nodes(2) as (names, _), ranks_on(names, "cut", Path(name)) as processes:
        folder = Path(name)
        _wait_for(folder, "running-?", 4, 120)
        os.killpg(processes[1].pid, signal.SIGKILL)
        died = time.time()
        _wait_for(folder, "said-[01]", 2, 40)
        said = _said(folder, 2)
    for mine in said:
        assert mine["error"] == "PeerFailed", said
        assert mine["failed"] in (2, 3), said
        assert mine["at"] - died < KEEPALIVE_S["cut"] + 4, said
