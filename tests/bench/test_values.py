"""Values: what is wrong is seen."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from bench import loop
from bench.systems.base import Bytes, Job, System
from bench.values import Pool, WrongBytes


def test_messages_differ_by_source_destination_and_iteration() -> None:
    pool = Pool(256)
    every = {pool.message(p, q, i, 64).tobytes() for p in range(8) for q in range(8) for i in range(8)}
    assert len(every) == 8**3
    assert pool.message(1, 2, 3, 64).tobytes() == Pool(256).message(1, 2, 3, 64).tobytes()


def test_filled_messages_are_right_and_a_changed_byte_is_not() -> None:
    pool, buffer = Pool(100), np.zeros(150, np.uint8)
    pool.fill(buffer, 1, 7, [100, 0, 50])
    pool.check(buffer[:100], 1, 0, 7, 100)
    pool.check(buffer[100:], 1, 2, 7, 50)
    buffer[120] ^= 1
    with pytest.raises(
        WrongBytes, match="iteration 7, from rank 1 to rank 2: 1 of 50 bytes are wrong, the first at 20"
    ):
        pool.check(buffer[100:], 1, 2, 7, 50)
    with pytest.raises(WrongBytes, match="99 bytes, not 100"):
        pool.check(buffer[:99], 1, 0, 7, 100)


class Loopback(System):
    """One rank that gives itself what it sends, `late` iterations late."""

    def __init__(self, job: Job, spoil: Callable[[int, Bytes], None]) -> None:
        super().__init__(job)
        self.spoil = spoil
        self.turns: list[int] = []
        self.flying: list[tuple[int, Bytes]] = []

    def complete(self) -> None:
        i, message = self.flying.pop(0)
        self.spoil(i, message)
        if self.consume is not None:
            self.consume(i, [message])

    def turn(self, i: int) -> None:
        self.turns.append(i)
        if len(self.flying) == self.depth:
            self.complete()
        message = np.zeros(self.job.sizes[i % self.phases][0][0], np.uint8)
        if self.produce is not None:
            self.produce(i, message)
        self.flying.append((i, message))

    def finish(self, i: int) -> None:
        while self.flying:
            self.complete()

    def close(self) -> None:
        pass


JOB = Job("job", "loopback", 0, 1, 2, True, [[[10]], [[30]], [[0]]])


def test_loops_run_the_same_turns() -> None:
    system = Loopback(JOB, lambda i, message: None)
    assert loop.verified(system, Pool(30), 6) == 80
    stamps = loop.timed(system, warm=2, chunks=3, turns=4)
    assert len(stamps) == 4
    assert stamps == sorted(stamps)
    assert system.turns == list(range(6 + 2 + 12))
    assert system.produce is None
    assert system.consume is None


def test_the_verified_loop_notices() -> None:
    def spoil(i: int, message: Bytes) -> None:
        if i == 4:
            message[3] ^= 255

    with pytest.raises(WrongBytes, match="iteration 4"):
        loop.verified(Loopback(JOB, spoil), Pool(30), 6)


def test_job_without_self() -> None:
    job = Job("job", "x", 1, 2, 0, False, [[[1, 2], [3, 4]]])
    assert (job.sent(), job.received(), job.largest) == ([[3, 4]], [[2, 4]], 4)
    assert (job.without_self().sent(), job.without_self().received()) == ([[3, 0]], [[2, 0]])
