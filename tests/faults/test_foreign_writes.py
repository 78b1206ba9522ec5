"""Somebody scribbles over a live exchange: typed errors or nothing, never a crash, a wild access or an endless wait."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from blsrdma import Exchange
from blsrdma.errors import BlsrdmaError, ConcurrentUse, PeerTimeout, WindowCorrupt
from tests.patterns import TRANSPORTS, message, messages
from tests.ranks import run_ranks


def _scribble(rank, world, store, seed, checksum):
    """Rank 1's arena is written at random while it runs: counters, headers, farewells, descriptors, payloads."""
    rng = np.random.default_rng(seed)
    outcome = "ran"
    with Exchange(
        store, rank, world, lag=1, window_bytes=256, checksum=checksum, timeout=2, close_timeout=1
    ) as exchange:
        memory = exchange._bytes
        try:
            for i in range(200):
                exchange.begin()
                sizes = [int(size) for size in rng.choice([0, 8, 256, 2000], world)]
                with exchange.post(messages(rank, i, sizes), sizes) as received:
                    if checksum:  # whatever is handed out is right
                        for q in range(world):
                            np.testing.assert_array_equal(received[q], message(q, rank, i, len(received[q])))
                if rank == 1 and i > 5:
                    start = int(rng.integers(128, len(memory) - 64)) & ~7
                    size = int(rng.choice([1, 8, 16, 64]))
                    memory[start : start + size] = rng.integers(0, 256, size, dtype=np.uint8)
        except BlsrdmaError as error:
            outcome = type(error).__name__
            raise
        finally:
            store.set(f"outcome {rank}", outcome)


@pytest.mark.parametrize(
    ("transport", "seed", "checksum"),
    [*(("default", seed, checksum) for seed in range(4) for checksum in (False, True)),
     *((transport, 4, True) for transport in ("default-puts", "tcp", "tcp-puts"))],
)  # fmt: skip
def test_scribbling(transport: str, seed: int, checksum: bool) -> None:
    started = time.monotonic()
    results = run_ranks(_scribble, 2, seed, checksum, env=TRANSPORTS[transport], check=False, timeout=60)
    assert time.monotonic() - started < 30
    for result in results:
        assert result.exit_code in (0, 1), f"crashed: {result}"
        if result.error:
            assert isinstance(result.error.exception, BlsrdmaError), result


def _counter(rank, world, store, value):
    """Rank 0's counter at rank 1 is overwritten by something that rank 0 cannot have written."""
    with Exchange(store, rank, world, timeout=3, close_timeout=1) as exchange:
        for i in range(3):
            with exchange.post(np.full(world, i)):
                pass
        if rank == 1:
            line = exchange.geometry.control_offset
            exchange._bytes[line : line + 16].view(np.uint64)[:] = value
            handle = exchange.post(np.zeros(world))
            with pytest.raises(WindowCorrupt, match="rank 0: its counter .* is not in 3 .. 5"):
                handle.wait()
            with pytest.raises(WindowCorrupt):  # it is not used any more
                exchange.post(np.zeros(world))
            store.set("seen", "1")
        else:
            store.get("seen")


@pytest.mark.parametrize("value", [(7, 7), (2**63, 0), (0, 2**64 - 1)])
def test_a_lying_counter_is_told(value: tuple[int, int]) -> None:
    run_ranks(_counter, 2, value)


def _payload(rank, world, store, size):
    with Exchange(store, rank, world, checksum=True, window_bytes=1000, timeout=5) as exchange:
        send = messages(rank, 0, [size] * world)
        handle = exchange.post(send, [size] * world)
        store.add("posted", 1)
        while store.add("posted", 0) < world:
            time.sleep(0.001)
        if size > 1000:
            if rank == 0:
                send[-1] ^= 1  # changed between post and pull
        elif rank == 1:
            exchange._bytes[exchange.geometry.window(1, 0, 0) + 64 + size - 1] ^= 1
        store.add("changed", 1)
        while store.add("changed", 0) < world:
            time.sleep(0.001)
        if rank == 1:
            with pytest.raises(WindowCorrupt, match="rank 0: its .*message does not match its checksum"):
                handle.wait()
        store.add("done", 1)
        while store.add("done", 0) < world:
            time.sleep(0.001)


@pytest.mark.parametrize("size", [1, 1000, 5000])
def test_a_changed_payload_is_told(size: int) -> None:
    run_ranks(_payload, 2, size)


# --- threads, forks, other users


def _two_threads(rank, world, store):
    with Exchange(store, rank, world, timeout=10) as exchange:
        handle = exchange.post(np.zeros(world))
        handle.wait()
        handle.release()
        if rank == 0:
            caught = []
            waiting = exchange.post(np.zeros(world))

            def wait():
                waiting.wait()
                caught.append("waited")

            thread = threading.Thread(target=wait)
            thread.start()
            time.sleep(0.2)
            with pytest.raises(ConcurrentUse, match="one thread at a time"):
                waiting.wait()
            store.set("go", "1")
            thread.join()
            assert caught == ["waited"]
        else:
            store.get("go")
            exchange.post(np.zeros(world)).wait()


def test_two_threads_at_once_are_refused() -> None:
    run_ranks(_two_threads, 2)


def _threads_of_their_own(rank, world, store):
    """Several exchanges in one process, each in a thread of its own, at the same time."""
    errors = []

    def run(name):
        try:
            from torch.distributed import TCPStore

            own = TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=False)
            with Exchange(own, rank, world, name=name, lag=1, window_bytes=512) as exchange:
                for i in range(300):
                    with exchange.post(messages(rank, i, [100] * world), [100] * world) as received:
                        for q in range(world):
                            np.testing.assert_array_equal(received[q], message(q, rank, i, 100))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


@pytest.mark.parametrize("environment", [{}, {"UCX_TLS": "tcp,self"}], ids=["default", "tcp"])
def test_exchanges_in_threads_of_their_own(environment: dict[str, str]) -> None:
    run_ranks(_threads_of_their_own, 2, env=environment)


def _fork(rank, world, store):
    with Exchange(store, rank, world) as exchange:
        child = os.fork()
        if child == 0:
            try:
                exchange.post(np.zeros(world))
            except BlsrdmaError as error:
                ok = "made before this process was forked; only the parent can use it" in str(error)
            else:
                ok = False
            try:
                Exchange(store, rank, world, name="other")
                ok = False
            except BlsrdmaError as error:
                ok = ok and "UCX does not survive" in str(error)
            exchange.close()
            os._exit(0 if ok else 1)
        assert os.waitpid(child, 0)[1] == 0
        with exchange.post(np.zeros(world)):  # the parent goes on
            pass


def test_a_fork_is_refused_with_a_sentence() -> None:
    run_ranks(_fork, 2)


def _permissions(rank, world, store):
    """The modes of all shared memory that this process has mapped: System V segments, files and unlinked files."""
    with Exchange(store, rank, world):
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        segments = {fields[4] for fields in maps if "SYSV" in fields[-1] or "SYSV" in "".join(fields[5:])}
        table = [line.split() for line in Path("/proc/sysvipc/shm").read_text().splitlines()[1:]]
        modes = [int(fields[2], 8) for fields in table if fields[1] in segments]
        for fd in Path("/proc/self/fd").iterdir():
            with contextlib.suppress(OSError):
                if "/dev/shm" in str(fd.readlink()):
                    modes.append(fd.stat().st_mode)
        return modes


@pytest.mark.parametrize("tls", ["posix,self", "sysv,self"])
def test_shared_memory_is_its_owners_alone(tls: str) -> None:
    for result in run_ranks(_permissions, 2, env={"UCX_TLS": tls}):
        assert result.value
        assert all(mode & 0o077 == 0 for mode in result.value), [oct(mode) for mode in result.value]


# --- waiting costs little


def _idle(rank, world, store, seconds):
    with Exchange(store, rank, world, timeout=100) as exchange:
        handle = exchange.post(np.zeros(world)) if rank == 0 else None
        if rank == 0:
            before = time.process_time()
            with pytest.raises(PeerTimeout):
                handle.wait(timeout=seconds)
            share = (time.process_time() - before) / seconds
            store.set("waited", "1")
            handle.wait()
            return share
        store.get("waited")
        exchange.post(np.zeros(world)).wait()
        return 0.0


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["default", "tcp"])
def test_an_idle_minute(transport: str) -> None:
    results = run_ranks(_idle, 2, 60.0, env=TRANSPORTS[transport], timeout=120)
    print(f"{transport}: {results[0].value:.2%} of a core while it waited a minute")
    assert results[0].value < 0.02, f"{results[0].value:.1%} of a core"


@pytest.mark.parametrize("environment", [{}, {"UCX_TLS": "tcp,self"}], ids=["default", "tcp"])
def test_an_idle_rank_burns_nothing(environment: dict[str, str]) -> None:
    results = run_ranks(_idle, 2, 4.0, env=environment)
    assert results[0].value < 0.02, f"{results[0].value:.1%} of a core"
