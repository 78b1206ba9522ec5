"""`python -m bench advise`: what each lag would give a job, from the timings of a run of it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path

from bench.simulate import per_iteration
from bench.table import Table, console, times
from bench.timings import Timings, from_csv, from_trace
from blsrdma import request_windows
from blsrdma.errors import BlsrdmaError
from blsrdma.settings import default_memory_limit, format_size, parse_size
from blsrdma.windows import WindowGeometry, windows_needed

ABOUT = """\
Say what each lag, and an exchange that couples no loops (blsrdma.Lookup), would give a job of yours, and which to take.

It reads how long each rank was busy in each iteration of a run, and computes from it how long the same iterations would
have taken: by the max-plus model T[r,i] = max(T[r,i-1], max over q of T[q,i-lag-1]) + busy[r,i]. The run may have had
any lag; it must be one with its usual delays, and some hundred iterations long.
"""
EXAMPLES = """\
from a trace of blsrdma, which knows what a rank waited for:
  BLSRDMA_TRACE=trace torchrun --nproc-per-node 4 job.py
  python -m bench advise --trace trace

from a file of your own, whatever your job exchanges with: the seconds that a rank spent in an iteration outside of the
exchange (what it waits there for others must not be in it), and what the exchange itself costs:
  rank,iteration,seconds
  0,0,0.00112
  1,0,0.00108
  ...
  python -m bench advise --csv timings.csv --cost 60 --window-bytes 256K

Memory is what a rank registers for windows of --window-bytes, which should hold its usual messages (larger ones are
pulled). A lag also makes results later: an iteration's are taken when the lag's further ones have been started.
"""
LAGS = [0, 1, 2, 4, 8, 16]
WORTH = 1.05  # what a change has to gain to be worth mentioning
_SHORT = 20  # iterations for each one in flight: with fewer, the model sees mostly the start
_LOOKUP_LAG = 1  # of the uncoupled exchange: one request ahead


@dataclass(frozen=True)
class Choice:
    """What a lag would give. lag: None for the exchange that couples no loops."""

    lag: int | None
    seconds: float  # per iteration
    gain: float  # time at lag 0 / time
    memory_bytes: int  # of a rank


@dataclass(frozen=True)
class Advice:
    """`lag`: recommended; None: the exchange that couples no loops."""

    lag: int | None
    reason: str


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "advise", help="which lag a job of yours should take, from its timings", description=ABOUT, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--trace", type=Path, metavar="FOLDER", help="that BLSRDMA_TRACE named in the run")
    source.add_argument("--csv", type=Path, metavar="FILE", help="with the columns rank, iteration, seconds")
    parser.add_argument("--exchange", metavar="NAME", help="of the trace, where it has several")
    parser.add_argument("--lags", type=_lag, nargs="+", default=LAGS, help="(0 1 2 4 8 16)")
    parser.add_argument("--cost", type=_cost, default=0.0, metavar="US",
                        help="microseconds of the exchange itself; a trace has them in it (0)")  # fmt: skip
    parser.add_argument("--window-bytes", type=_size, default="1M", metavar="SIZE", help="(%(default)s)")
    parser.add_argument("--memory-limit", type=_size, metavar="SIZE",
                        help="no lag over it is recommended (half of this machine, by ranks)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything; - for standard output, alone")


def run(options: argparse.Namespace) -> int:
    """Exit status 2 where there are no timings to go by."""
    try:
        timings = from_trace(options.trace, options.exchange) if options.trace else from_csv(options.csv)
    except BlsrdmaError as error:
        print(error, file=sys.stderr)
        return 2
    ranks = timings.busy.shape[0]
    limit = default_memory_limit(ranks) if options.memory_limit is None else options.memory_limit
    found = choices(timings, options.lags, options.window_bytes, options.cost)
    advice = advise(timings, found, limit)
    notes = remarks(timings, found, limit)
    if options.json:
        values = {"source": timings.source, "ranks": ranks, "iterations": timings.busy.shape[1],
                  "lag": timings.lag, "measured_seconds": timings.measured, "delivery_seconds": timings.delivery,
                  "cost_seconds": options.cost, "window_bytes": options.window_bytes, "memory_limit": limit,
                  "choices": [asdict(choice) for choice in found], "advice": asdict(advice),
                  "remarks": notes}  # fmt: skip
        text = json.dumps(values, indent=1) + "\n"
        if str(options.json) == "-":
            print(text, end="")
            return 0
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text)
    table = Table(
        f"{timings.source}: {ranks} ranks, {timings.busy.shape[1]} iterations",
        ["<lag", "ms per iteration", "speed / lag 0", "memory of a rank"],
        [[_name(c.lag), f"{c.seconds * 1e3:.3f}", times(c.gain), format_size(c.memory_bytes)] for c in found],
        notes,
    )
    out = console()
    table.print(out)
    out.print()
    out.print(f"Take {_name(advice.lag, 'lag ')}: {advice.reason}", highlight=False)
    return 0


def choices(timings: Timings, lags: list[int], window_bytes: int, cost: float = 0.0) -> list[Choice]:
    """Lag 0, the lags in order, and at last the exchange that couples no loops. cost: seconds per iteration."""
    order = sorted({0, *lags})
    ranks = timings.busy.shape[0]
    seconds = per_iteration(timings.busy, [*order, inf], cost, timings.delivery).tolist()
    memory = [WindowGeometry(ranks, windows_needed(lag), window_bytes).arena_bytes for lag in order]
    arenas = request_windows.geometries(ranks, _LOOKUP_LAG, window_bytes, window_bytes)
    memory.append(sum(arena.arena_bytes for arena in arenas))
    return [
        Choice(lag, time, seconds[0] / time if time else 1.0, size)
        for lag, time, size in zip([*order, None], seconds, memory, strict=True)
    ]


def advise(timings: Timings, found: list[Choice], memory_limit: int) -> Advice:
    """The smallest lag that comes within 5 % of the best one that memory allows and the run is long enough to judge; no
    lag where that gains nothing, with what would help."""
    *bounded, free = found
    longest = max(0, timings.busy.shape[1] // _SHORT - 1)
    allowed = [c for c in bounded if c.memory_bytes <= memory_limit and (c.lag or 0) <= longest] or bounded[:1]
    best = min(choice.seconds for choice in allowed)
    chosen = next(choice for choice in allowed if choice.seconds <= best * WORTH)
    uncoupled = chosen.seconds / free.seconds if free.seconds else 1.0
    more = f"an exchange that couples no loops (blsrdma.Lookup) would give {times(free.gain)} times that of lag 0"
    if chosen.lag:
        reason = f"{times(chosen.gain)} times the speed of lag 0, and none that can be recommended here adds 5 %"
        return Advice(chosen.lag, reason + (f"; {more}" if uncoupled > WORTH else ""))
    if uncoupled > WORTH:
        return Advice(None, f"no lag here gains 5 %, as its ranks' delays outlast it, and {more}")
    means = timings.busy.mean(axis=1)
    slowest, even = int(means.argmax()), float(means.mean())
    if even and means[slowest] / even > WORTH:
        return Advice(0, (
            f"rank {slowest} is slow all the time ({means[slowest] * 1e3:.3f} ms, the mean is {even * 1e3:.3f}), which "
            f"no lag hides; work spread evenly would give up to {times(float(means[slowest]) / even)} times"
        ))  # fmt: skip
    return Advice(0, "the ranks are balanced and nothing delays them for long: there is no time to gain by a lag")


def remarks(timings: Timings, found: list[Choice], memory_limit: int) -> list[str]:
    """What to know about the numbers."""
    lines = ["Uncoupled: no rank waits for another's loop (blsrdma.Lookup; memory at its lag 1)."]
    if timings.measured is not None and timings.lag is not None:
        seconds = float(per_iteration(timings.busy, [timings.lag], delivery=timings.delivery)[0])
        lines.append(
            f"The run itself, at lag {timings.lag}: {timings.measured * 1e3:.3f} ms measured, {seconds * 1e3:.3f} by "
            f"the model; messages came {timings.delivery * 1e6:.0f} µs after their post to who waited for them."
        )
    iterations, longest = timings.busy.shape[1], max(choice.lag or 0 for choice in found)
    if iterations < _SHORT * (longest + 1):
        most = max(0, iterations // _SHORT - 1)
        lines.append(
            f"Only {iterations} iterations: lags above {most} look better than they are, and are not recommended."
        )
    if over := [choice for choice in found if choice.memory_bytes > memory_limit]:
        names = ", ".join(_name(choice.lag) for choice in over)
        lines.append(f"Over the memory limit of {format_size(memory_limit)}: {names}.")
    return lines


def _name(lag: int | None, before: str = "") -> str:
    return "uncoupled" if lag is None else f"{before}{lag}"


def _lag(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) > 1000:
        raise argparse.ArgumentTypeError(f"{text!r} is not an integer from 0 to 1000")
    return int(text)


def _cost(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of microseconds >= 0")
    return value / 1e6


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is {error}") from None
