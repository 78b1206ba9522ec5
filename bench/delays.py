"""`python -m bench delays`: the exchange under delays, at each lag, next to the peers and to the max-plus model."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from bench import delay_report, measuring, report
from bench.cases import Case
from bench.harness import Effort
from bench.launchers import Interpreters
from bench.publish import publish
from dlrm import delays
from dlrm.errors import OptionError

ABOUT = """\
Measure an all-to-all whose ranks are delayed, in every system: ours at each lag, MPI and gloo blocking, and both with
as many operations in flight as the lag allows. The loop: complete iteration i - lag - 1, sleep, start iteration i.

Delays are drawn once for each repetition, the same for every system, and counted as they were really slept. Each time
is compared with the max-plus model of just these delays, in which the exchange costs what it costs the fastest system
where nothing is delayed. Values are checked, every byte, before and after. Repetitions go round the systems.
"""
PLANS = ["none", "exp:p=0.1,mean=2ms", "lognormal:p=0.1,median=1ms,sigma=1", "rotate:every=10,time=10ms",
          "slow:time=1ms", "pause:every=50,time=20ms"]  # fmt: skip
SYSTEMS = ["bls", "gloo", "gloo-nb", "mpich", "mpich-nb", "openmpi", "openmpi-nb"]
_FULL = {
    "ranks": [2, 4, 8],
    "bytes": ["64K", "zipf"],
    "lags": [0, 1, 2, 4, 8, 16],
    "repeat": 5,
    "seconds": 0.25,
    "iterations": 500,
}
_QUICK = {"ranks": [4], "bytes": ["64K", "zipf"], "lags": [0, 8], "repeat": 2, "seconds": 0.04, "iterations": 150}
EXAMPLES = """\
examples:
  python -m bench delays --quick                                         a first look, some minutes
  python -m bench delays --json out/delays.json --resume --plot out/delays.png      an hour, can be interrupted
  python -m bench delays --ranks 4 --lags 0 4 16 --delay exp:p=0.1,mean=2ms --bytes 64K --systems bls gloo

plans of delays (python -m dlrm --delay takes them too):
""" + delays.__doc__.partition("\n\n")[2].partition("\n\n")[0]


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "delays", help="every system while ranks are delayed, at each lag, next to the model", description=ABOUT,
        epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    measuring.add_options(parser, "delays", "0 1 2 4 8 16; 0 8 with --quick", SYSTEMS)
    parser.add_argument("--delay", type=_plan, nargs="+", default=PLANS, metavar="PLAN",
                        help=f"see below; none is always among them ({' '.join(PLANS[1:])})")  # fmt: skip
    parser.add_argument("--iterations", type=int, help="of one delayed repetition (500; 150 with --quick)")


def run(options: argparse.Namespace) -> int:
    """Exit status 1 when a system failed (not when it is absent)."""
    measuring.fill_in(options, _QUICK if options.quick else _FULL)
    effort = Effort(options.repeat, options.seconds, options.iterations)
    plans = dict.fromkeys(["none", *options.delay])
    cases = [
        Case(ranks, size, lag, delay=plan)
        for ranks in options.ranks for size in options.bytes for plan in plans for lag in options.lags
    ]  # fmt: skip
    results = measuring.begin(options, {"systems": options.systems} | asdict(effort))
    interpreters = Interpreters(options.mpich_python, options.openmpi_python)
    measuring.measure(results, cases, options.systems, effort, interpreters, options.json)
    if results.measurements:
        publish(options, results.command, report.about(results), delay_report.tables(results))
        if options.plot:
            from bench.delay_plot import draw

            draw(results, options.plot)
    return int(measuring.failed(results))


def _plan(text: str) -> str:
    try:
        delays.parse(text, 0)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
