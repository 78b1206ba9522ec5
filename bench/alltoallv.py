"""`python -m bench alltoallv`: every system on the same cases."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from bench import measuring, report, systems
from bench.cases import Case
from bench.harness import Effort
from bench.launchers import TRANSPORTS, Interpreters
from bench.publish import publish

ABOUT = """\
Measure an all-to-all of messages in every system, in one run on one machine.

Each system gets the same table of sizes and the same loop: complete iteration i - lag - 1, start iteration i. It first
proves its values, every byte. Then repetitions go round: in each, every system is timed once, while the others sleep.
Raw samples, versions, load and the transports really used are kept in the JSON file.
"""
_FULL = {"ranks": [2, 4, 8], "bytes": ["1K", "16K", "256K", "1M", "zipf"], "lags": [0, 4], "repeat": 5, "seconds": 0.25}
_QUICK = {"ranks": [2], "bytes": ["1K", "256K", "zipf"], "lags": [0], "repeat": 2, "seconds": 0.04}
EXAMPLES = """\
examples:
  python -m bench alltoallv --quick                                 a first look, half a minute
  python -m bench alltoallv --ranks 2 4 8 --lags 0 4 --json out/alltoallv.json --plot out/alltoallv.png
  python -m bench alltoallv --ranks 2 --bytes 8 1K --systems bls bls-wait openmpi --repeat 9
  python -m bench alltoallv --self view copy --systems bls-copy openmpi   the message to oneself copied by all, too
  python -m bench table out/alltoallv.json --markdown               the tables again, from the file

systems:
""" + "\n".join(f"  {name:15} {kind.about}" for name, kind in systems.SYSTEMS.items())


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "alltoallv", help="every system on the same messages", description=ABOUT, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    measuring.add_options(parser, "alltoallv", "0 4", systems.DEFAULT)
    parser.add_argument("--self", dest="self_message", choices=["view", "copy"], nargs="+", default=["view"],
                        help="the message to oneself: a view, not sent by peers; or copied by all (view)")  # fmt: skip
    parser.add_argument("--read", action="store_true", help="every rank reads every byte it got, inside the timed part")
    parser.add_argument("--transport", choices=list(TRANSPORTS), default="default", help="blsrdma's (%(default)s)")


def run(options: argparse.Namespace) -> int:
    """Exit status 1 when a system failed (not when it is absent)."""
    measuring.fill_in(options, _QUICK if options.quick else _FULL)
    effort = Effort(options.repeat, options.seconds)
    cases = [
        Case(ranks, size, lag, self_message, options.read)
        for ranks in options.ranks for self_message in options.self_message
        for size in options.bytes for lag in options.lags
    ]  # fmt: skip
    results = measuring.begin(options, {"systems": options.systems, "transport": options.transport} | asdict(effort))
    interpreters = Interpreters(options.mpich_python, options.openmpi_python)
    measuring.measure(results, cases, options.systems, effort, interpreters, options.json, options.transport)
    publish(options, results.command, report.about(results), report.tables(results))
    if options.plot and results.measurements:
        from bench.plot import draw

        draw(results, options.plot)
    return int(measuring.failed(results))
