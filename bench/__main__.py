"""`python -m bench COMMAND`; see `python -m bench --help`."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from bench import advise, alltoallv, delays, inference, large, lookups, parse, peers, quiet, report, scale, stress
from bench.gpu import command as gpu
from bench.limits import command as limits
from bench.paper import command as paper
from bench.publish import add_options, publish
from bench.results import Results

ABOUT = """\
Measurements of blsrdma, next to the peers and to the limits of the machine.

Numbers mean something only on a quiet machine: close what else runs, compare within one run, and look at the spreads.
"""
EXAMPLES = """\
start here:
  python -m bench peers                  set up MPICH and Open MPI, once (in .venv-mpich and .venv-openmpi)
  python -m bench alltoallv --quick      every system, half a minute
  python -m bench delays --quick         the same while ranks are delayed, next to the model, minutes
  python -m bench paper --quick          all experiments, a quarter of an hour, and a report
  python -m bench limits                 what this machine could do at best
  python -m bench lookups --quick        lookups with a collective and without
  python -m bench gpu --quick            tables and messages in GPU memory
  python -m bench stress --quick         random everything, verified
  python -m bench advise --help          which lag a job of yours should take
Each command explains itself: python -m bench alltoallv --help
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m bench", description=ABOUT, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    alltoallv.add(commands)
    advise.add(commands)
    delays.add(commands)
    gpu.add(commands)
    inference.add(commands)
    large.add(commands)
    lookups.add(commands)
    parse.add(commands)
    quiet.add(commands)
    limits.add(commands)
    paper.add(commands)
    scale.add(commands)
    stress.add(commands)
    peers.add(commands)
    _add_table(commands)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # in order: ranks ended, folders removed
    try:
        status: int = options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status


def _add_table(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("table", help="the tables and the picture again, from a JSON file of alltoallv")
    parser.add_argument("file", type=Path)
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write the picture")
    add_options(parser, "alltoallv")
    parser.set_defaults(run=_table)


def _table(options: argparse.Namespace) -> int:
    results = Results.load(options.file)
    publish(options, results.command, report.about(results), report.tables(results))
    if options.plot:
        from bench.plot import draw

        draw(results, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
