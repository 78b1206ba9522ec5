"""The part of `python -m bench large` that runs in both ranks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.systems.ours import Ours
from bench.values import Pool
from blsrdma import Exchange

_MEMORY_LIMIT = 8 << 30


@dataclass(frozen=True)
class Way:
    """How the same bytes can go to the other rank."""

    name: str
    windows: int = 1  # that a message fills
    parts: int = 1  # messages it is cut into, one an iteration
    checksum: bool = False


WAYS = [
    Way("one window"),
    Way("3 windows, pulled", windows=3),
    Way("16 windows, pulled", windows=16),
    Way("cut into 3", parts=3),
    Way("cut into 16", parts=16),
    Way("one window, checksum", checksum=True),
    Way("3 windows, checksum", windows=3, checksum=True),
]


def run(runtime: Ours, progress: Callable[[int], None], size: int, repeat: int, seconds: float) -> dict[str, Any]:
    """Nanoseconds for `size` bytes to the other rank and as many from it, of every way and repetition."""
    rank, other = runtime.rank, 1 - runtime.rank
    pool = Pool(size, 1)
    samples: dict[str, list[float]] = {way.name: [] for way in WAYS}
    open_ways = [(way, _open(runtime, way, size)) for way in WAYS]
    try:
        send, out = pool.message(rank, other, 0, size).copy(), np.empty(size, np.uint8)
        turns: dict[str, int] = {}
        for way, exchange in open_ways:  # every byte is right, and how many turns fill the time
            out[:] = 0
            for _ in range(3):
                began = time.perf_counter()
                _turn(exchange, way, send, out, rank)
            pool.check(out, other, rank, 0, size)
            turns[way.name] = int(_agreed(exchange, max(3.0, seconds / (time.perf_counter() - began))))
        for repetition in range(repeat):
            for way, exchange in open_ways:
                began = time.perf_counter_ns()
                for _ in range(turns[way.name]):
                    _turn(exchange, way, send, out, rank)
                samples[way.name].append((time.perf_counter_ns() - began) / turns[way.name])
            progress(repetition + 1)
        peers = open_ways[0][1].stats()["peers"]
        return {"samples": samples, "large": sorted({p["large"] for p in peers} - {""})}
    finally:
        for _, exchange in open_ways:
            exchange.close()


def _open(runtime: Ours, way: Way, size: int) -> Exchange:
    return Exchange(
        runtime.store, runtime.rank, runtime.ranks, name=f"large {size} {way.name}", checksum=way.checksum,
        window_bytes=-(-size // (way.windows * way.parts)), memory_limit=_MEMORY_LIMIT,
    )  # fmt: skip


def _turn(exchange: Exchange, way: Way, send: NDArray[np.uint8], out: NDArray[np.uint8], rank: int) -> None:
    """`send` to the other rank, and as much from it into `out`, which was there before."""
    step = -(-len(send) // way.parts)
    for start in range(0, len(send), step):
        piece = send[start : start + step]
        counts = [len(piece), 0] if rank else [0, len(piece)]
        handle = exchange.post(piece, counts)
        handle.wait(out=out[start : start + step], counts=counts)
        handle.release()


def _agreed(exchange: Exchange, value: float) -> float:
    """The least of all ranks' values."""
    with exchange.post(np.full(exchange.world_size, value)) as received:
        return float(min(each[0] for each in received))
