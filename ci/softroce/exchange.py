"""The exchange over RDMA verbs, without torch (whose import takes half a minute in the guest): each case on every rank.

    python ci/softroce/exchange.py        with UCX_TLS and the rest as ci/softroce/inside sets them

Ranks are forked from this process, which has loaded everything, and meet in a store made of files. Ends with a line
"N passed, N failed"; every wait has a deadline.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for tests.patterns

from blsrdma import Exchange
from blsrdma.errors import PeerFailed, PeerLeft
from tests.patterns import message, messages

RANKS = 3
CASE_SECONDS = 60
EXPECTED = os.environ.get("EXPECTED_TRANSPORT", "rc_verbs/rxe0:1")


class FileStore:
    """As much of a torch.distributed Store as a rendezvous needs, in a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def set(self, key: str, value: str) -> None:
        temporary = self._folder / f"{os.getpid()}.tmp"
        temporary.write_text(value)
        temporary.rename(self._path(key))

    def get(self, key: str) -> bytes:
        return self._path(key).read_bytes()

    def check(self, keys: list[str]) -> bool:
        return all(self._path(key).exists() for key in keys)

    def has_extended_api(self) -> bool:
        return False

    def wait(self, key: str) -> None:
        limit = time.monotonic() + CASE_SECONDS
        while not self.check([key]):
            assert time.monotonic() < limit, f"no {key}"
            time.sleep(0.01)

    def _path(self, key: str) -> Path:
        return self._folder / key.replace("/", "_")


# --- the cases: each is called on every rank


def every_pair_goes_by_verbs(rank: int, store: FileStore) -> None:
    with Exchange(store, rank, RANKS, name="wiring", window_bytes=64) as exchange:
        for peer in exchange.stats()["peers"]:
            if peer["rank"] != rank:
                assert peer["path"] == "put", peer
                assert EXPECTED in peer["transport"], peer
        if rank == 0:
            print("  transport:", exchange.stats()["peers"][1]["transport"], flush=True)


def _irregular(
    rank: int, store: FileStore, name: str, lag: int, sizes: list[int], iterations: int, checksum: bool
) -> None:
    """Messages of irregular sizes, looked at as soon as ready() says so, overwritten by their sender as soon as sent()
    does."""
    draw = np.random.default_rng(1000 * lag + rank)
    with Exchange(store, rank, RANKS, name=name, lag=lag, window_bytes=16_384, checksum=checksum) as exchange:
        handles, buffers = deque(), deque()

        def finish() -> None:
            handle = handles.popleft()
            limit = time.monotonic() + CASE_SECONDS
            while not handle.ready():
                assert time.monotonic() < limit, "not ready in time"
                time.sleep(0)
            with handle as received:
                for q in range(RANKS):
                    np.testing.assert_array_equal(received[q], message(q, rank, handle.iteration, len(received[q])))

        for i in range(iterations):
            assert exchange.begin() == i
            if len(handles) > lag:
                finish()
            counts = [int(draw.choice([*sizes, int(draw.integers(max(sizes) + 1))])) for _ in range(RANKS)]
            send = messages(rank, i, counts)
            handles.append(exchange.post(send, counts))
            buffers.append((handles[-1], send))
            while buffers and buffers[0][0].sent():
                buffers.popleft()[1][:] = 0xEE  # nothing of it may reach anybody
        while handles:
            finish()
        with exchange.post(np.zeros(RANKS, np.uint8)):
            pass  # everybody has pulled
        limit = time.monotonic() + CASE_SECONDS
        while not all(handle.sent() for handle, _ in buffers):
            assert time.monotonic() < limit, "not sent in time"
            time.sleep(0.001)
        assert exchange.stats()["max_lead"] <= lag
    from blsrdma import exchange as room

    assert not room._quarantine


def messages_are_whole_at_lag_0(rank: int, store: FileStore) -> None:
    _irregular(rank, store, "lag0", 0, [0, 1, 63, 64, 4097, 16_384], 150, False)


def messages_are_whole_at_lag_3(rank: int, store: FileStore) -> None:
    _irregular(rank, store, "lag3", 3, [0, 1, 63, 64, 4097, 16_384], 150, False)


def large_messages_are_pulled(rank: int, store: FileStore) -> None:
    _irregular(rank, store, "large", 1, [0, 10, 16_384, 16_385, 100_000], 25, True)


def one_leaves_early(rank: int, store: FileStore) -> None:
    exchange = Exchange(store, rank, RANKS, name="leaves", window_bytes=64, timeout=30)
    with exchange.post(np.zeros(RANKS)):
        pass
    if rank == 1:
        return exchange.close()
    try:
        exchange.post(np.zeros(RANKS)).wait()
        raise AssertionError("nobody was missed")
    except PeerLeft as error:
        assert error.rank == 1, error
        exchange.close(error)


def one_is_killed(rank: int, store: FileStore) -> None:
    exchange = Exchange(store, rank, RANKS, name="killed", lag=1, window_bytes=4096, timeout=30, keepalive=6)
    for _ in range(3):
        with exchange.post(np.zeros(RANKS * 512)):
            pass
    store.set(f"ready{rank}", "")
    for other in range(RANKS):
        store.wait(f"ready{other}")
    if rank == 1:
        exchange.post(np.zeros(RANKS * 512))
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        while True:
            with exchange.post(np.zeros(RANKS * 512)):
                pass
    except PeerFailed as error:
        took = time.monotonic() - began
        assert "rank 1" in str(error), error
        exchange.close(error)
        assert time.monotonic() - began < took + 10, "close() takes too long"
        if rank == 0:
            print(f"  after {took:.1f} s: {error}", flush=True)


CASES: list[Callable[[int, FileStore], None]] = [
    every_pair_goes_by_verbs, messages_are_whole_at_lag_0, messages_are_whole_at_lag_3, large_messages_are_pulled,
    one_leaves_early, one_is_killed,
]  # fmt: skip
DIES = {one_is_killed: {1: -signal.SIGKILL}}


def _rank(case: Callable[[int, FileStore], None], rank: int, folder: Path) -> None:
    try:
        case(rank, FileStore(folder))
    except BaseException:
        print(f"  rank {rank}:\n{traceback.format_exc()}", flush=True)
        os._exit(1)


def run(case: Callable[[int, FileStore], None]) -> bool:
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as name:
        began = time.monotonic()
        ranks = [context.Process(target=_rank, args=(case, rank, Path(name)), daemon=True) for rank in range(RANKS)]
        for each in ranks:
            each.start()
        for each in ranks:
            each.join(max(0.0, began + CASE_SECONDS + 30 - time.monotonic()))
        codes = [each.exitcode for each in ranks]
        for each in ranks:
            each.kill()
            each.join()
    passed = codes == [DIES.get(case, {}).get(rank, 0) for rank in range(RANKS)]
    took = time.monotonic() - began
    print(f"{'ok  ' if passed else 'FAIL'} {case.__name__} ({took:.1f} s)", "" if passed else codes, flush=True)
    return passed


def main() -> int:
    outcomes = [run(case) for case in CASES]
    print(f"{sum(outcomes)} passed, {len(outcomes) - sum(outcomes)} failed", flush=True)
    return 0 if all(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
