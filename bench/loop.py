"""The loops that every system runs: those that take time, without and with delays, and one that checks values."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.systems.base import Bytes, System
from bench.values import Pool


def timed(system: System, warm: int, chunks: int, turns: int, read: bool = False) -> list[int]:
    """`chunks` times `turns` turns without a pause; returns the monotonic clock (ns, the same for all processes of a
    machine) before the first chunk and after each. Warm-up turns come first, in the same stream."""
    if read:
        system.consume = _read
    i = system.next
    turn, now = system.turn, time.monotonic_ns
    collecting = gc.isenabled()
    gc.disable()
    try:
        for j in range(i, i + warm):
            turn(j)
        i += warm
        stamps = [now()]
        for _ in range(chunks):
            for j in range(i, i + turns):
                turn(j)
            i += turns
            stamps.append(now())
        system.finish(i)
    finally:
        if collecting:
            gc.enable()
    system.next = i
    system.consume = None
    return stamps


def delayed(system: System, warm: int, stalls: Sequence[float]) -> tuple[int, int, list[list[int]]]:
    """A turn for each of `stalls`, which are seconds of sleep after i - lag - 1 is complete and before i starts, until
    all is complete. Returns the clock at the beginning and the end, and [turn, ns really slept] of each sleep."""
    first = system.next + warm
    slept: list[list[int]] = []
    now, sleep = time.monotonic_ns, time.sleep

    def stall(i: int, _: Bytes) -> None:
        seconds = stalls[i - first]
        if seconds > 0:
            before = now()
            sleep(seconds)
            slept.append([i - first, now() - before])

    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(system.next, first):
            system.turn(i)
        system.finish(first)  # everyone has been here: the ranks begin at about the same time
        system.produce = stall
        begun = now()
        for i in range(first, first + len(stalls)):
            system.turn(i)
        system.finish(first + len(stalls))
        ended = now()
    finally:
        system.produce = None
        if collecting:
            gc.enable()
    system.next = first + len(stalls)
    return begun, ended, slept


def verified(system: System, pool: Pool, turns: int) -> int:
    """The same turns with every byte of every message written before it is sent and checked when it has come. Returns
    the number of bytes checked. Raises bench.values.WrongBytes."""
    job = system.job
    sent, received = job.sent(), job.received()
    checked = 0

    def produce(i: int, buffer: Bytes) -> None:
        pool.fill(buffer, job.rank, i, sent[i % system.phases])

    def consume(i: int, messages: Sequence[Bytes]) -> None:
        nonlocal checked
        for source, (message, size) in enumerate(zip(messages, received[i % system.phases], strict=True)):
            pool.check(message, source, job.rank, i, size)
            checked += size

    system.produce, system.consume = produce, consume
    try:
        for i in range(system.next, system.next + turns):
            system.turn(i)
        system.finish(system.next + turns)
    finally:
        system.produce = system.consume = None
    system.next += turns
    return checked


def _read(_: int, messages: Sequence[Any]) -> None:
    for message in messages:
        if len(message):
            np.bitwise_xor.reduce(message.view(np.int64) if len(message) % 8 == 0 else message)
