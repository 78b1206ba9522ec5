"""`python -m bench limits`: what this machine could do at best, and where we are, in the same minute."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import environment
from bench.cases import Case, bytes_label
from bench.harness import Effort, Harness
from bench.launchers import Interpreters, Unavailable
from bench.limits import perftest
from bench.limits.native import Native
from bench.publish import add_options, publish
from bench.results import Results
from bench.summary import Summary, summarise
from bench.table import Table, microseconds, times
from blsrdma.settings import format_size, parse_size

ABOUT = """\
Measure the limits of this machine, and blsrdma next to them in the same minute: copies in memory, flags between two
processes, TCP over loopback, and UCX's own put benchmark.
"""
PARTS = ["native", "ucx", "ours"]
SIZES = ["4K", "64K", "256K", "1M", "4M", "64M"]


@dataclass(frozen=True)
class Limit:
    """One limit, in nanoseconds."""

    name: str
    bytes: int
    summary: Summary
    samples: list[float]


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command's options."""
    parser = commands.add_parser("limits", help="what this machine could do at best", description=ABOUT)
    parser.set_defaults(run=run)
    parser.add_argument("--quick", action="store_true", help="little time for each number")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS,
                        help="native: memory, flags, TCP; ucx: ucx_perftest; ours: blsrdma (all)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, with the samples")
    add_options(parser, "limits")


def run(options: argparse.Namespace) -> int:
    seconds = 0.1 if options.quick else 0.5
    facts, skipped = environment.describe(), {}
    for warning in environment.disturbed(facts["busy_before"]):
        print(warning, file=sys.stderr)
    limits: list[Limit] = []
    for name, size, measure in _plan(seconds, options.parts):
        try:
            samples = measure()
        except Unavailable as reason:
            skipped[name] = str(reason)
            continue
        limits.append(Limit(name, size, summarise(samples), samples))
    ours: dict[str, Results] = {}
    if "ours" in options.parts:
        ours = {transport: _ours(transport, cases, options.quick) for transport, cases in _CASES.items()}
    tables = [_limits_table(limits)]
    if ours:
        tables.append(_against(limits, ours))
    facts["load_after"] = environment.load()
    about = [
        *environment.disturbed(facts["busy_before"]),
        f"{facts['date']}, commit {facts['commit']}, {facts['cpu']}, {facts['cores']} cores, {facts['caches']}",
        f"load average {facts['load_before']} before, {facts['load_after']} after (our own processes included)",
        *(f"left out: {name}: {reason}" for name, reason in skipped.items()),
    ]
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        data = {"environment": facts, "limits": [asdict(limit) for limit in limits], "skipped": skipped,
                "ours": {name: asdict(results) for name, results in ours.items()}}  # fmt: skip
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    publish(options, f"python -m bench {' '.join(sys.argv[1:])}", about, tables)
    return int(any(results.skipped for results in ours.values()))


def _plan(seconds: float, parts: list[str]) -> list[tuple[str, int, Callable[[], list[float]]]]:
    """What to measure, in the order of the table."""
    cores = sorted(os.sched_getaffinity(0))
    pair = f"{cores[0]},{cores[1]}" if len(cores) > 1 else ""
    plan: list[tuple[str, int, Callable[[], list[float]]]] = []

    def native(name: str, what: str, size: str, *more: str) -> None:
        def measure() -> list[float]:
            with Native() as program:
                return program.samples(what, parse_size(size), seconds, *more)

        if "native" in parts:
            plan.append((name, parse_size(size), measure))

    def put(name: str, test: str, size: str, transports: str) -> None:
        if "ucx" in parts:
            plan.append((name, parse_size(size), lambda: perftest.put(test, parse_size(size), transports, seconds)))

    for size in SIZES:
        native("memcpy, one thread", "memcpy", size)
    if pair:
        for size in ("0", "64K", "1M"):
            native("flag ping-pong, two cores, round trip", "flag", size, "spin", pair)
        for size in ("0", "64K", "1M"):
            native("both store, both wait, two cores", "swap", size, "spin", pair)
        native("flag ping-pong, two cores, yielding", "flag", "0", "yield", pair)
    native("flag ping-pong, one core, yielding", "flag", "0", "yield", f"{cores[0]},{cores[0]}")
    native("TCP over loopback, round trip", "tcp", "8")
    native("TCP over loopback, stream", "tcpstream", "64K")
    native("TCP over loopback, stream", "tcpstream", "1M")
    for label, transports in (("posix", "posix,self"), ("tcp", "tcp,self")):
        for size in ("8", "64K", "1M"):
            put(f"ucx_perftest put, {label}, one way", "ucp_put_lat", size, transports)
        put(f"ucx_perftest put, {label}, stream", "ucp_put_bw", "64K", transports)
    return plan


_CASES = {
    "default": [Case(2, "8", 0), Case(2, "64K", 0), Case(2, "1M", 0)],
    "tcp": [Case(2, "64K", 0), Case(2, "64K", 4)],
    "one-tcp": [Case(2, "64K", 0), Case(2, "64K", 4)],
}


def _ours(transport: str, cases: list[Case], quick: bool) -> Results:
    results = Results(f"limits, {transport}", {})
    effort = Effort(2, 0.05) if quick else Effort(5, 0.25)
    report: Callable[[str], None] = lambda text: print(text, file=sys.stderr)  # noqa: E731
    Harness(results, ["bls", "bls-wait"], effort, Interpreters(), transport, report=report).run(cases)
    return results


def _limits_table(limits: list[Limit]) -> Table:
    table = Table(
        "Limits of this machine",
        ["<what", "bytes", "µs", "±", "best µs", "GB/s"],
        notes=[
            "Medians ± half the interquartile range; best: the smallest sample.",
            "GB/s: bytes over the median; twice for a round trip, and of one direction where both store.",
        ],
    )
    for limit in limits:
        s = limit.summary
        bandwidth = limit.bytes * (2 if "round trip" in limit.name else 1) / s.median
        table.rows.append([
            limit.name, bytes_label(str(limit.bytes)), microseconds(s.median), f"{s.spread:.0%}", microseconds(s.low),
            f"{bandwidth:.1f}" if limit.bytes >= 4096 else "–",
        ])  # fmt: skip
    return table


def _against(limits: list[Limit], ours: dict[str, Results]) -> Table:
    """The goals that name a limit."""
    table = Table(
        "blsrdma against the limits (2 ranks, message to oneself a view)",
        ["<what", "<transport", "lag", "ours µs", "limit µs", "<limit", "ratio", "<goal"],
    )
    by_name = {(limit.name, limit.bytes): limit.summary.median for limit in limits}

    def row(
        what: str,
        transport: str,
        case: Case,
        system: str,
        limit: tuple[str, int],
        speed: bool,
        goal: str,
        ways: int = 1,
    ) -> None:
        found = ours[transport].of(case).get(system)
        if found is None or limit not in by_name:
            return
        mine, theirs = found.summary.median, by_name[limit]
        paths = sorted({path for fact in found.facts for path in fact.get("paths", [])})
        ratio = ways * theirs / mine if speed else mine / theirs
        table.rows.append([what, ", ".join(paths), str(case.lag), microseconds(mine), microseconds(theirs),
                           f"{limit[0]}, {format_size(limit[1])}", times(ratio), goal])  # fmt: skip

    flag = ("flag ping-pong, two cores, round trip", 0)
    row("8 bytes, views: times the ping-pong", "default", Case(2, "8", 0), "bls", flag, False, "≤ 5")
    row("8 bytes, wait only: times the ping-pong", "default", Case(2, "8", 0), "bls-wait", flag, False, "≤ 5")
    swap = ("both store, both wait, two cores", 1 << 20)
    row(
        "1 MiB: speed over memcpy's", "default", Case(2, "1M", 0), "bls", ("memcpy, one thread", 1 << 20), True, "≥ 0.8"
    )
    row("1 MiB: speed over the bare exchange's", "default", Case(2, "1M", 0), "bls", swap, True, "")
    swap = ("both store, both wait, two cores", 1 << 16)
    row("64 KiB: speed over the bare exchange's", "default", Case(2, "64K", 0), "bls", swap, True, "")
    limit = ("ucx_perftest put, tcp, stream", 1 << 16)
    for transport in ("tcp", "one-tcp"):
        for lag in (0, 4):
            case = Case(2, "64K", lag)
            row("64 KiB over TCP: speed over a stream of puts", transport, case, "bls", limit, True, "≥ 0.7")
            row("the same, counting what goes both ways at once", transport, case, "bls", limit, True, "", ways=2)
    return table
