"""Endings: an exception in the loop, Ctrl-C, a restart on the same store, many ranks on few cores."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from blsrdma import Exchange
from blsrdma.errors import PeerFailed
from tests.patterns import TRANSPORTS, message, messages
from tests.ranks import run_ranks, store_server


def _raises(rank, world, store):
    with Exchange(store, rank, world, lag=1, timeout=30) as exchange:
        for i in range(10):
            if rank == 2 and i == 4:
                raise ZeroDivisionError("in the loop")
            with exchange.post(np.zeros(world)):
                pass


@pytest.mark.parametrize("transport", ["default", "tcp"])
def test_an_exception_in_the_loop(transport: str, no_leftovers: None) -> None:
    started = time.monotonic()
    results = run_ranks(_raises, 3, env=TRANSPORTS[transport], check=False)
    assert time.monotonic() - started < 15
    assert isinstance(results[2].error.exception, ZeroDivisionError)
    for result in results[:2]:
        assert isinstance(result.error.exception, PeerFailed)
        assert "rank 2 failed: ZeroDivisionError: in the loop" in result.error.message


@pytest.mark.parametrize("transport", ["default", pytest.param("tcp", marks=pytest.mark.slow)])
def test_ctrl_c(transport: str) -> None:
    """Ctrl-C in a wait ends that rank at once, and its peer with one message that says so."""
    server = store_server()
    torchrun = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
    script = "\n".join(
        [
            "import signal",
            "import numpy as np",
            "from blsrdma import Exchange",
            "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it",
            "with Exchange(timeout=100) as exchange:",
            "    with exchange.post(np.zeros(2)):",
            "        pass",
            "    if exchange.rank == 1:",
            "        exchange._store.wait(['go'])  # posts nothing until then",
            "    else:",
            "        handle = exchange.post(np.zeros(2))",
            "        print('waiting', flush=True)",
            "        handle.wait()",
            "    for _ in range(2):",
            "        with exchange.post(np.zeros(2)):",
            "            pass",
        ]
    )
    ranks = []
    for rank in range(2):
        environment = {**os.environ, **torchrun, **TRANSPORTS[transport], "RANK": str(rank)}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen([sys.executable, "-c", script], env=environment, **pipes))
    assert ranks[0].stdout.readline() == "waiting\n"
    time.sleep(0.3)
    pressed = time.monotonic()
    ranks[0].send_signal(signal.SIGINT)
    try:
        _, error = ranks[0].communicate(timeout=30)
        assert time.monotonic() - pressed < 8  # 5 s of them for the peer to close, too
        assert "KeyboardInterrupt" in error
        from torch.distributed import PrefixStore

        PrefixStore("blsrdma/attempt0", server).set("go", "1")
        _, error = ranks[1].communicate(timeout=30)
        assert "rank 0 failed: KeyboardInterrupt" in error
    finally:
        for rank in ranks:
            rank.kill()


def _smaller(rank, world, store):
    """After rank 1 has died the others go on without it, under a new name on the same store."""
    exchange = Exchange(store, rank, world, timeout=30)
    with exchange.post(np.zeros(world)):
        pass
    store.add("ready", 1)
    if rank == 1:
        while store.add("ready", 0) < world:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(PeerFailed) as failure:
        while True:
            with exchange.post(np.zeros(world)):
                pass
    exchange.close(failure.value)
    survivors = [r for r in range(world) if r != failure.value.rank]
    with Exchange(store, survivors.index(rank), len(survivors), name="again", window_bytes=4096) as smaller:
        for i in range(50):
            send = messages(smaller.rank, i, [i] * smaller.world_size)
            with smaller.post(send) as received:
                for q, got in enumerate(received):
                    np.testing.assert_array_equal(got, message(q, smaller.rank, i, i))


@pytest.mark.parametrize("transport", ["default", "tcp"])
def test_survivors_form_a_smaller_exchange(transport: str, no_leftovers: None) -> None:
    run_ranks(_smaller, 3, env=TRANSPORTS[transport], expect_exit={1: -signal.SIGKILL})


RESTARTED = """
import os, sys
import numpy as np
from blsrdma import Exchange
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
with Exchange(lag=attempt, timeout=60) as exchange:
    for i in range(20):
        if attempt == 0 and exchange.rank == 1 and i == 10:
            os.kill(os.getpid(), 9)
        with exchange.post(np.full(exchange.world_size, i * (attempt + 1))) as received:
            assert all((each == i * (attempt + 1)).all() for each in received)
    open(sys.argv[1] + f"/done-{attempt}-{exchange.rank}", "w").close()
"""


@pytest.mark.parametrize("transport", ["default", pytest.param("tcp", marks=pytest.mark.slow)])
def test_torchrun_restarts(transport: str, tmp_path: Path) -> None:
    """The second attempt runs on the store of the first, with other settings, and never meets what the first left."""
    script = tmp_path / "restarted.py"
    script.write_text(RESTARTED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts",
               "1", str(script), str(tmp_path)]  # fmt: skip
    environment = {**os.environ, **TRANSPORTS[transport]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.glob("done-*")) == ["done-1-0", "done-1-1"]


def _many(rank, world, store):
    with Exchange(store, rank, world, lag=1, window_bytes=1024, timeout=60) as exchange:
        for i in range(200):
            with exchange.post(messages(rank, i, [50] * world), [50] * world) as received:
                for q, got in enumerate(received):
                    np.testing.assert_array_equal(got, message(q, rank, i, 50))


def test_eight_ranks_on_few_cores(no_leftovers: None) -> None:
    run_ranks(_many, 8, timeout=60)
