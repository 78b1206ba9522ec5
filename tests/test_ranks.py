"""The harness itself: what it reports, and that nothing outlives it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from datetime import timedelta
from multiprocessing import shared_memory
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed import TCPStore

from tests import ranks
from tests.ranks import Result, no_leftovers, run_ranks, store_server


class Unpicklable(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")  # pickling calls __init__ with one argument: fails


def introduce(rank: int, world_size: int, store: TCPStore, greeting: str, *, name: str) -> dict[str, object]:
    store.set(f"pid {rank}", str(os.getpid()))
    return {
        "text": f"{greeting} {name} from {rank} of {world_size}",
        "pids": [int(store.get(f"pid {other}")) for other in range(world_size)],
        "environment": {key: os.environ.get(key) for key in ("RANK", "WORLD_SIZE", "MASTER_PORT", "COLOUR", "OUTER")},
        "threads": (torch.get_num_threads(), len(os.listdir(f"/proc/{os.getppid()}/task"))),  # noqa: PTH208
        "ucxx": "ucxx" in sys.modules or [key for key in os.environ if key.startswith("UCX_")],
    }


def misbehave(rank: int, world_size: int, store: TCPStore, how: dict[int, str]) -> int:
    print(f"this is rank {rank}", flush=True)
    os.write(2, b"and its stderr\n")
    match how.get(rank):
        case "raise":
            raise ValueError(f"a mistake of rank {rank}")
        case "raise unpicklable":
            raise Unpicklable("cannot", "travel")
        case "return unpicklable":
            return threading.Lock()  # type: ignore[return-value]
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "exit":
            os._exit(7)
        case "exit 0":
            os._exit(0)
        case "sleep":
            the_function_that_hangs()
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hold the interpreter":
            the_function_that_spins()
        case "start a child":
            subprocess.Popen(["sleep", "1000"])
    return rank


def the_function_that_hangs() -> None:
    time.sleep(1000)


def the_function_that_spins() -> None:
    while True:  # its frame is there whenever the signal comes; that of a generator in sum() was not, 20 times of 300
        np.ones(1)


def processes_named(*names: str) -> set[str]:
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if [argument.decode(errors="replace") for argument in arguments[: len(names)]] == list(names):
            found.add(process.name)
    return found


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def test_results_in_rank_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTER", "seen")
    results = run_ranks(introduce, 3, "hello", name="world", env=[{"COLOUR": c} for c in ("red", "green", "blue")])
    assert [result.rank for result in results] == [0, 1, 2]
    assert [result.value["text"] for result in results] == [f"hello world from {rank} of 3" for rank in range(3)]
    assert [result.value["environment"]["COLOUR"] for result in results] == ["red", "green", "blue"]
    assert all(result.value["environment"]["OUTER"] == "seen" for result in results)
    assert [result.value["environment"]["RANK"] for result in results] == ["0", "1", "2"]
    assert len(set(results[0].value["pids"])) == 3
    assert all(result.value["pids"] == results[0].value["pids"] for result in results)
    assert all(result.error is None and result.exit_code == 0 for result in results)


def test_a_rank_is_as_good_as_new() -> None:
    """One thread of torch, none but the first in the process forked from, and no trace of ucxx."""
    (result,) = run_ranks(introduce, 1, "hello", name="world")
    assert result.value["threads"] == (1, 1)
    assert result.value["ucxx"] == [key for key in os.environ if key.startswith("UCX_")]


def test_starting_four_ranks_takes_little_time() -> None:
    run_ranks(misbehave, 1, {})  # starts the server
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        run_ranks(misbehave, 4, {})
        seconds.append(time.monotonic() - start)
    assert min(seconds) < 1.5, seconds  # 0.2 s on two idle cores


def test_exceptions_are_reported() -> None:
    with pytest.raises(AssertionError, match="2 of 4 ranks failed") as caught:
        run_ranks(misbehave, 4, {1: "raise", 3: "raise unpicklable"})
    text = str(caught.value)
    assert "ValueError: a mistake of rank 1" in text
    assert "Unpicklable: cannot travel" in text
    assert 'in misbehave\n    raise ValueError(f"a mistake' in text
    assert "this is rank 1\nand its stderr" in text
    assert "rank 2" not in text
    assert isinstance(caught.value.__cause__, ValueError)


def test_results_of_failed_ranks_without_check() -> None:
    how = {
        0: "raise",
        1: "raise unpicklable",
        2: "return unpicklable",
        3: "kill",
        4: "segfault",
        5: "exit",
        6: "exit 0",
    }
    results = run_ranks(misbehave, 8, how, check=False)

    def about(result: Result) -> tuple[object, ...]:
        assert result.error is not None
        return result.error.type, type(result.error.exception), result.exit_code

    assert about(results[0]) == ("ValueError", ValueError, 1)
    assert about(results[1]) == ("Unpicklable", type(None), 1)
    assert about(results[2]) == ("TypeError", TypeError, 1)
    assert about(results[3]) == ("Exit", type(None), -signal.SIGKILL)
    assert about(results[4]) == ("Exit", type(None), -signal.SIGSEGV)
    assert "in misbehave" in results[4].output  # faulthandler's
    assert about(results[5]) == ("Exit", type(None), 7)
    assert about(results[6]) == ("Exit", type(None), 0)
    assert results[7] == Result(7, 7, None, 0, "this is rank 7\nand its stderr\n")
    assert "killed by SIGKILL" in str(results[3])


def test_a_killed_rank_is_reported() -> None:
    with pytest.raises(AssertionError, match=r"1 of 3 ranks failed\s+rank 1 .*killed by SIGKILL"):
        run_ranks(misbehave, 3, {1: "kill"})


def test_expected_ends() -> None:
    results = run_ranks(misbehave, 3, {0: "kill", 2: "exit"}, expect_exit={0: -signal.SIGKILL, 2: 7})
    assert [result.value for result in results] == [None, 1, None]
    with pytest.raises(AssertionError, match="1 of 2 ranks failed"):
        run_ranks(misbehave, 2, {}, expect_exit={0: -signal.SIGKILL})  # it should have died


def test_a_hang_ends_with_stacks() -> None:
    start = time.monotonic()
    with pytest.raises(AssertionError, match=r"ranks \[0, 2, 3\] did not end within 2") as caught:
        run_ranks(misbehave, 4, {0: "sleep", 2: "hold the interpreter", 3: "stop"}, timeout=2, check=False)
    text = str(caught.value)
    assert "in the_function_that_hangs" in text
    assert "in the_function_that_spins" in text
    assert "rank 1 " not in text
    if shutil.which("gdb") and "ptrace: Operation not permitted" not in text and "took too long" not in text:
        assert "\nThread 1 " in text
    assert time.monotonic() - start < 45


def test_what_a_rank_started_ends_with_it() -> None:
    before = processes_named("sleep", "1000")
    run_ranks(misbehave, 2, {0: "start a child", 1: "start a child"})
    deadline = time.monotonic() + 5
    while processes_named("sleep", "1000") - before:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_ranks_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(Path(ranks.__file__).parent.parent)!r})
        from tests.ranks import run_ranks
        from tests.test_ranks import tell_and_sleep
        if __name__ == "__main__":
            run_ranks(tell_and_sleep, 2, {str(tmp_path)!r})
    """)
    (tmp_path / "parent.py").write_text(script)
    parent = subprocess.Popen([sys.executable, tmp_path / "parent.py"])
    deadline = time.monotonic() + 60
    while len(pids := [int(file.name) for file in tmp_path.glob("[0-9]*")]) < 2:
        assert time.monotonic() < deadline
        assert parent.poll() is None
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    while not all(gone(pid) for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def tell_and_sleep(rank: int, world_size: int, store: TCPStore, folder: str) -> None:
    (Path(folder) / str(os.getpid())).touch()
    time.sleep(1000)


def test_a_store_that_outlives_its_ranks() -> None:
    server = store_server()
    first = run_ranks(introduce, 2, "hello", name="world", store=server)
    client = TCPStore(ranks.HOST, server.port, is_master=False, timeout=timedelta(seconds=5))
    assert [int(client.get(f"pid {rank}")) for rank in range(2)] == first[0].value["pids"]
    run_ranks(introduce, 2, "hello", name="world", store=server)
    assert first[0].value["environment"]["MASTER_PORT"] == str(server.port)


def test_wrong_number_of_environments() -> None:
    with pytest.raises(ValueError, match="1 environments for 2 ranks"):
        run_ranks(misbehave, 2, {}, env=[{}])


def test_leftovers_are_noticed(no_leftovers: None) -> None:
    with pytest.raises(AssertionError, match="left behind: /dev/shm/"), ranks.no_leftovers(grace=0.1):
        segment = shared_memory.SharedMemory(create=True, size=4096)
    segment.close()
    segment.unlink()
    with ranks.no_leftovers(grace=0.1):
        run_ranks(misbehave, 2, {})


def test_leftover_sysv_segments_are_noticed() -> None:
    libc = __import__("ctypes").CDLL(None)
    with pytest.raises(AssertionError, match="left behind: sysv segment"), no_leftovers(grace=0.1):
        segment = libc.shmget(0, 4096, 0o1600)
    libc.shmctl(segment, 0, None)
