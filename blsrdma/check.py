"""`python -m blsrdma check`: try every pair of ranks before a run, and say what is broken, slow or odd.

On every rank: an exchange of all, with messages that are looked at the moment they are announced; then, in rounds of
disjoint pairs, an exchange of each pair alone: 8 bytes for the latency, large messages one way and the other for the
bandwidth. What each rank found goes through the store to rank 0, which judges (blsrdma.links) and prints.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blsrdma import hosts, launchers, links, spawn
from blsrdma.errors import BlsrdmaError, RankFailed, SettingsError
from blsrdma.links import Facts
from blsrdma.rendezvous import store_from_environment
from blsrdma.settings import OTHER_VARIABLES, parse_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray
    from torch.distributed import Store

    from blsrdma.exchange import Exchange
    from blsrdma.handle import Handle
    from blsrdma.launchers import Place

_LAG = 3
_PARTING_SECONDS = 5.0
_ORDER_BYTES = 1 << 16
_ORDER_ITERATIONS = 200
_SHIFTS = 4096  # so many different messages of one size
_SMALL = (20, 10)  # so many blocks of so many iterations; the best block counts
_LARGE = (5, 8)


def add(commands: Any) -> None:
    """Add the command to those of blsrdma/__main__.py."""
    parser = commands.add_parser(
        "check",
        help="test every pair of ranks before a run: wiring, order of writes, speed; slow links and odd nodes",
        description="Tries every pair of ranks. Start it as you would start the run (torchrun --nproc-per-node 8 -m "
        "blsrdma check; srun python -m blsrdma check; mpirun ...), or with --ranks on this machine alone.",
        epilog="Exit status: 0 an exchange works; 1 it would fail or be wrong; 3 with --strict: something is slow or "
        "odd; 2 wrong arguments. (torchrun makes 1 of all but 0.)",
    )
    parser.add_argument("--ranks", type=_ranks, metavar="N", help="start N ranks on this machine")
    parser.add_argument("--message", type=_size, default=1 << 20, metavar="BYTES", help="for the bandwidth (1M)")
    parser.add_argument("--one-by-one", action="store_true", help="never two pairs at a time: slower, and undisturbed")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="S", help="seconds for each step (60)")
    parser.add_argument("--strict", action="store_true", help="exit with 3 where something is slow or odd")
    parser.add_argument("--json", metavar="FILE", help="write everything there; - prints it instead of the text")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw both matrices as heat maps (matplotlib)")
    parser.set_defaults(run=run)


def _ranks(text: str) -> int:
    if not text.isdigit() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 2")
    return int(text)


def _size(text: str) -> int:
    try:
        return max(8, parse_size(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is {error}") from None


def run(given: argparse.Namespace) -> int:
    """Start the ranks, or be one; the exit status."""
    place = launchers.find()
    if place is None:
        if given.ranks is None:
            raise SettingsError("no launcher has started this: use torchrun, srun or mpirun, or give --ranks N")
        try:
            spawn.launch("blsrdma", given.command_line, given.ranks)
        except RankFailed as failed:
            if failed.rank == 0 and failed.status in (1, 3):
                return failed.status  # it has said why
            raise
        return 0
    if given.ranks not in (None, place.world_size):
        raise SettingsError(f"--ranks {given.ranks}, but {place.launcher} has started {place.world_size}")
    spawn.die_with_launcher()
    return _be_a_rank(place, given)


def _be_a_rank(place: Place, given: argparse.Namespace) -> int:
    store = store_from_environment(place.rank, place.world_size, given.timeout)
    facts = probe(store, place.rank, place.world_size, given.message, given.timeout, given.one_by_one)
    store.set(f"check/facts/{place.rank}", json.dumps(asdict(facts)))
    if place.rank:
        # A launcher may end all when the first one ends, and the store ends with rank 0: each waits for the other.
        with suppress(RuntimeError):  # it has ended already
            _await(store, ["check/judged"], 3 * given.timeout)
            store.set(f"check/gone/{place.rank}", "")
        return 0
    # Nobody measures longer than this rank and some waits in vain.
    everyone = _await(store, [f"check/facts/{rank}" for rank in range(place.world_size)], 3 * given.timeout)
    ranks = [Facts.of(json.loads(text)) if text else None for text in everyone]
    found = links.findings(ranks)
    values = {
        "ranks": [each and asdict(each) for each in ranks],
        "findings": [asdict(each) for each in found],
        "message_bytes": given.message,
        "status": links.status(found, given.strict),
    }
    if given.json == "-":
        print(json.dumps(values, indent=2))
    else:
        for line in links.report(ranks, given.message):
            print(line)
        print("\n".join(map(str, found)) or "all is well")
        if given.json:
            Path(given.json).write_text(json.dumps(values, indent=2) + "\n")
    if given.plot:
        from blsrdma import heatmap

        heatmap.draw(given.plot, ranks, given.message)
    sys.stdout.flush()
    store.set("check/judged", "")
    _await(store, [f"check/gone/{rank}" for rank in range(1, place.world_size) if ranks[rank]], _PARTING_SECONDS)
    return links.status(found, given.strict)


def _await(store: Store, keys: Sequence[str], seconds: float) -> list[str]:
    """The values of `keys`; "" for those that are not there at the deadline."""
    deadline, waiting = time.monotonic() + seconds, set(keys)
    while waiting and time.monotonic() < deadline:
        waiting = {key for key in waiting if not store.check([key])}
        time.sleep(0.01)
    return ["" if key in waiting else store.get(key).decode() for key in keys]


# --- on each rank


def probe(store: Store, rank: int, world_size: int, message: int, timeout: float, one_by_one: bool = False) -> Facts:
    """Everything this rank finds out. Errors are part of it; nothing is raised but by bad settings."""
    facts, failed = about(rank), dict[int, str]()
    latency, bandwidth = dict[int, float](), dict[int, float]()
    try:
        with _exchange(store, rank, world_size, "check/all", _LAG, _ORDER_BYTES, timeout) as exchange:
            peers = exchange.stats()["peers"]
            facts = replace(
                facts,
                path={peer["rank"]: peer["path"] for peer in peers if peer["rank"] != rank},
                transport={peer["rank"]: peer["transport"] for peer in peers if peer["rank"] != rank},
            )
            verified, torn = order(exchange)
            facts = replace(facts, verified=verified, torn=torn)
    except BlsrdmaError as error:
        return replace(facts, error=f"{type(error).__name__}: {error}")
    for number, pairs in enumerate(rounds(world_size, one_by_one)):
        if one_by_one and (reason := _barrier(store, number, rank, world_size, timeout)):
            return replace(facts, error=reason, latency=latency, bandwidth=bandwidth, failed=failed)
        for pair in pairs:
            if rank not in pair:
                continue
            other = sum(pair) - rank
            name = f"check/{pair[0]}-{pair[1]}"
            try:
                with _exchange(store, pair.index(rank), 2, name, 2, message, timeout) as exchange:
                    latency[other] = small(exchange)
                    for sender in (0, 1):
                        speed = large(exchange, sender, message)
                        if exchange.rank == sender:
                            bandwidth[other] = speed
            except BlsrdmaError as error:
                failed[other] = f"{type(error).__name__}: {error}"
    return replace(facts, latency=latency, bandwidth=bandwidth, failed=failed)


def about(rank: int) -> Facts:
    """What this process knows of itself without asking anybody."""
    from blsrdma.ucx import version

    ports = Path("/sys/class/infiniband").glob("*/ports/*")
    exempt = os.geteuid() == 0
    return Facts(
        rank=rank,
        host=platform.node(),
        place=hosts.host_id(),
        cores=hosts.cores(),
        ucx=version,
        environment={
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("UCX_", "BLSRDMA_")) and name not in OTHER_VARIABLES
        },
        devices=sorted(f"{p.parts[-3]}:{p.name}" for p in ports if "ACTIVE" in (p / "state").read_text()),
        locked=-1 if exempt else resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
    )


def rounds(world_size: int, one_by_one: bool = False) -> Iterator[list[tuple[int, int]]]:
    """Every pair once, in rounds of pairs that have no rank in common; or one pair a round."""
    if one_by_one:
        yield from ([(a, b)] for a in range(world_size) for b in range(a + 1, world_size))
        return
    circle = [*range(world_size), *[-1] * (world_size % 2)]
    for _ in range(len(circle) - 1):
        facing = zip(circle[: len(circle) // 2], reversed(circle[len(circle) // 2 :]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in facing if min(a, b) >= 0]
        circle.insert(1, circle.pop())


def _barrier(store: Store, number: int, rank: int, world_size: int, timeout: float) -> str:
    """Until every rank has come to it; why not, at the deadline."""
    store.set(f"check/round{number}/{rank}", "here")
    keys = [f"check/round{number}/{other}" for other in range(world_size)]
    missing = [other for other, said in enumerate(_await(store, keys, timeout)) if not said]
    return (
        f"ranks {', '.join(map(str, missing))} have not come to round {number} within {timeout:g} s" if missing else ""
    )


def _exchange(
    store: Store, rank: int, world_size: int, name: str, lag: int, window_bytes: int, timeout: float
) -> Exchange:
    from blsrdma.exchange import Exchange

    return Exchange(store, rank, world_size, name=name, lag=lag, window_bytes=window_bytes, timeout=timeout,
                    checksum=False, trace="")  # fmt: skip


def order(exchange: Exchange, iterations: int = _ORDER_ITERATIONS) -> tuple[int, list[str]]:
    """Messages of many sizes, compared the moment they are announced: how many, and what was wrong with which.

    The receiver polls and does not wait, to be as early as it can be. Each message of each iteration has other bytes,
    so that one which is not all there yet, or is an earlier one's, is told.
    """
    size, me, world = exchange.window_bytes, exchange.rank, exchange.world_size
    pattern = np.random.default_rng(1).integers(0, 256, size + _SHIFTS, np.uint8)
    sizes = np.random.default_rng(2).choice([0, 8, 64, 1000, 4096, size // 3, size], (iterations, world, world))

    def message(source: int, destination: int, i: int) -> NDArray[np.uint8]:
        shift = (source * 977 + destination * 89 + i * 7) % _SHIFTS
        return pattern[shift : shift + sizes[i, source, destination]]

    verified, torn, handles = 0, list[str](), deque["Handle"]()
    for i in range(iterations + exchange.lag + 1):  # the last few only finish
        if i < iterations:
            exchange.begin()
        if len(handles) > exchange.lag or i >= iterations:
            handle = handles.popleft()
            _poll(handle, exchange.settings.timeout)
            with handle as received:
                for source in range(world):
                    expected = message(source, me, handle.iteration)
                    verified += source != me
                    if not np.array_equal(received[source], expected):
                        torn.append(
                            f"message {handle.iteration} of rank {source} ({len(expected)} bytes) was announced before "
                            "all of it was there, or is not what was sent"
                        )
        if i < iterations:
            send = np.concatenate([message(me, q, i) for q in range(world)])
            handles.append(exchange.post(send, sizes[i, me].tolist()))
    return verified, torn


def _poll(handle: Handle, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not handle.ready() and time.monotonic() < deadline:
        time.sleep(0)  # wait() says what is wrong


def small(exchange: Exchange) -> float:
    """Microseconds of one iteration with 8 bytes each way."""
    blocks, length = _SMALL
    send = np.zeros(2, np.int64)
    return _block_seconds(exchange, [send], [[1, 1]], blocks, length) / length * 1e6


def large(exchange: Exchange, sender: int, size: int) -> float:
    """Bytes per second from rank `sender` of a pair to the other, with several messages in flight."""
    blocks, length = _LARGE
    counts = [0, 0]
    if exchange.rank == sender:
        counts[1 - sender] = size
    # One buffer for each iteration that may be in flight: none is touched while it is sent.
    buffers = [np.zeros(sum(counts), np.uint8) for _ in range(exchange.lag + 1)]
    return size * length / _block_seconds(exchange, buffers, [counts] * len(buffers), blocks, length)


def _block_seconds(
    exchange: Exchange, buffers: Sequence[NDArray[Any]], counts: Sequence[list[int]], blocks: int, length: int
) -> float:
    """The time of the best of `blocks` blocks of `length` iterations, as many of them in flight as there are buffers.

    The best one, for it is the link that is asked about, not what else the machine did."""
    times = []
    for _ in range(blocks + 1):  # the first one warms up
        began = time.perf_counter()
        handles = deque[Any]()
        for i in range(length + len(buffers)):
            if len(handles) == len(buffers) or i >= length:
                with handles.popleft():
                    pass
            if i < length:
                exchange.begin()
                handles.append(exchange.post(buffers[i % len(buffers)], counts[i % len(buffers)]))
        times.append(time.perf_counter() - began)
    return min(times[1:])
