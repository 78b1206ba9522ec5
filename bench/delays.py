"""`python -m bench delays`: the exchange under delays, at each lag, next to the peers and to the max-plus model."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from bench import delay_report, environment, report, systems
from bench.alltoallv import add_interpreters, begin
from bench.cases import Case, size_option
from bench.harness import Effort, Harness
from bench.launchers import Interpreters
from bench.publish import add_options, publish
from dlrm import delays
from dlrm.errors import OptionError

ABOUT = """\
Measure an all-to-all whose ranks are delayed, in every system: ours at each lag, MPI and gloo blocking, and both with
as many operations in flight as the lag allows. The loop: complete iteration i - lag - 1, sleep, start iteration i.

Delays are drawn once for each repetition, the same for every system, and counted as they were really slept. Each time
is compared with the max-plus model of just these delays, in which the exchange costs what it costs the fastest system
where nothing is delayed. Values are checked, every byte, before and after. Repetitions go round the systems.
"""
_PLANS = ["none", "exp:p=0.1,mean=2ms", "lognormal:p=0.1,median=1ms,sigma=1", "rotate:every=10,time=10ms",
          "slow:time=1ms", "pause:every=50,time=20ms"]  # fmt: skip
_SYSTEMS = ["bls", "gloo", "gloo-nb", "mpich", "mpich-nb", "openmpi", "openmpi-nb"]
_FULL = {"ranks": [2, 4, 8], "lags": [0, 1, 2, 4, 8, 16], "repeat": 5, "seconds": 0.25, "iterations": 500}
_QUICK = {"ranks": [4], "lags": [0, 8], "repeat": 2, "seconds": 0.04, "iterations": 150}
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
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of ranks (2 4 8; 4 with --quick)")
    parser.add_argument("--bytes", type=size_option, nargs="+", default=["64K", "zipf"],
                        help="to each peer; zipf or zipf:MEAN for irregular ones (64K zipf)")  # fmt: skip
    parser.add_argument("--lags", type=int, nargs="+", help="(0 1 2 4 8 16; 0 8 with --quick)")
    parser.add_argument("--delay", type=_plan, nargs="+", default=_PLANS, metavar="PLAN",
                        help=f"see below; none is always among them ({' '.join(_PLANS[1:])})")  # fmt: skip
    parser.add_argument("--systems", nargs="+", choices=list(systems.SYSTEMS), default=_SYSTEMS, metavar="SYSTEM",
                        help=f"those of alltoallv ({' '.join(_SYSTEMS)})")  # fmt: skip
    parser.add_argument("--repeat", type=int, help="repetitions (5; 2 with --quick)")
    parser.add_argument("--iterations", type=int, help="of one delayed repetition (500; 150 with --quick)")
    parser.add_argument("--seconds", type=float, help="of one undelayed repetition (0.25; 0.04 with --quick)")
    parser.add_argument("--quick", action="store_true", help="little time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, after each case")
    parser.add_argument("--resume", action="store_true", help="keep the cases that FILE already has")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture")
    add_options(parser, "delays")
    add_interpreters(parser)


def run(options: argparse.Namespace) -> int:
    """Exit status 1 when a system failed (not when it is absent)."""
    for name, value in (_QUICK if options.quick else _FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    effort = Effort(options.repeat, options.seconds, options.iterations)
    plans = dict.fromkeys(["none", *options.delay])
    cases = [
        Case(ranks, size, lag, delay=plan)
        for ranks in options.ranks for size in options.bytes for plan in plans for lag in options.lags
    ]  # fmt: skip
    results = begin(options, {"systems": options.systems} | asdict(effort))
    for warning in environment.disturbed(results.environment["busy_before"]):
        print(warning, file=sys.stderr)
    done = set(results.cases())
    cases = [case for case in cases if case not in done]

    def save() -> None:
        if options.json:
            results.save(options.json)

    with tqdm(total=len(cases) * len(options.systems) * effort.repeat, unit="block", disable=None, leave=False) as bar:
        harness = Harness(
            results, options.systems, effort, Interpreters(options.mpich_python, options.openmpi_python),
            report=lambda text: bar.write(text, file=sys.stderr), step=bar.update,
        )  # fmt: skip
        harness.run(cases, done=save)
    results.environment["load_after"] = environment.load()
    save()
    if not results.measurements:
        return 1
    publish(options, results.command, report.about(results), delay_report.tables(results))
    if options.plot:
        from bench.delay_plot import draw

        draw(results, options.plot)
    return int(any("failed at" in reason for reason in results.skipped.values()))


def _plan(text: str) -> str:
    try:
        delays.parse(text, 0)
    except OptionError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text
