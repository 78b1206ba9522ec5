"""`python -m bench alltoallv`: every system on the same cases."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from bench import environment, report, systems
from bench.cases import Case, size_option
from bench.harness import Effort, Harness
from bench.launchers import TRANSPORTS, Interpreters
from bench.publish import add_options, publish
from bench.results import Results

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
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of ranks (2 4 8)")
    parser.add_argument("--bytes", type=size_option, nargs="+",
                        help="to each peer; zipf or zipf:MEAN for irregular ones (1K 16K 256K 1M zipf)")  # fmt: skip
    parser.add_argument("--lags", type=int, nargs="+", help="(0 4)")
    parser.add_argument("--self", dest="self_message", choices=["view", "copy"], nargs="+", default=["view"],
                        help="the message to oneself: a view, not sent by peers; or copied by all (view)")  # fmt: skip
    parser.add_argument("--systems", nargs="+", choices=list(systems.SYSTEMS), default=systems.DEFAULT,
                        metavar="SYSTEM", help=f"see below ({' '.join(systems.DEFAULT)})")  # fmt: skip
    parser.add_argument("--read", action="store_true", help="every rank reads every byte it got, inside the timed part")
    parser.add_argument("--transport", choices=list(TRANSPORTS), default="default", help="blsrdma's (%(default)s)")
    parser.add_argument("--repeat", type=int, help="repetitions (5; 2 with --quick)")
    parser.add_argument("--seconds", type=float, help="of one system in one repetition (0.25; 0.04 with --quick)")
    parser.add_argument("--quick", action="store_true", help="2 ranks, 1K 256K zipf, lag 0, unless given; little time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, after each case")
    parser.add_argument("--resume", action="store_true", help="keep the cases that FILE already has")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture")
    add_options(parser, "alltoallv")
    add_interpreters(parser)


def add_interpreters(parser: argparse.ArgumentParser) -> None:
    """Where the MPIs are."""
    for kind in ("mpich", "openmpi"):
        parser.add_argument(f"--{kind}-python", metavar="PYTHON",
                            help=f"interpreter with mpi4py and {kind} (BENCH_{kind.upper()}_PYTHON, or .venv-{kind}, "
                            "which `python -m bench peers` makes)")  # fmt: skip


def run(options: argparse.Namespace) -> int:
    """Exit status 1 when a system failed (not when it is absent)."""
    for name, value in (_QUICK if options.quick else _FULL).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    effort = Effort(options.repeat, options.seconds)
    cases = [
        Case(ranks, size, lag, self_message, options.read)
        for ranks in options.ranks for self_message in options.self_message
        for size in options.bytes for lag in options.lags
    ]  # fmt: skip
    what = {"systems": options.systems, "transport": options.transport} | asdict(effort)
    results = begin(options, what)
    for warning in environment.disturbed(results.environment["busy_before"]):
        print(warning, file=sys.stderr)
    done = set(results.cases())
    cases = [case for case in cases if case not in done]

    def save() -> None:
        if options.json:
            results.save(options.json)

    total = len(cases) * len(options.systems) * effort.repeat
    with tqdm(total=total, unit="block", disable=None, leave=False) as bar:
        interpreters = Interpreters(options.mpich_python, options.openmpi_python)
        harness = Harness(
            results, options.systems, effort, interpreters, options.transport,
            report=lambda text: bar.write(text, file=sys.stderr), step=bar.update,
        )  # fmt: skip
        harness.run(cases, done=save)
    results.environment["load_after"] = environment.load()
    save()
    publish(options, results.command, report.about(results), report.tables(results))
    if options.plot and results.measurements:
        from bench.plot import draw

        draw(results, options.plot)
    return int(any("failed at" in reason for reason in results.skipped.values()) or not results.measurements)


def begin(options: argparse.Namespace, what: dict[str, object]) -> Results:
    """New results, or with --resume those that --json has of the same options and commit."""
    command = "python -m bench " + " ".join(sys.argv[1:])
    if options.resume and options.json and options.json.exists():
        earlier = Results.load(options.json)
        same = earlier.environment.get("commit", "").rstrip("+") == environment.commit().rstrip("+")
        if earlier.options == what and same:
            return earlier
        print(f"{options.json} is of other options or another commit: begun anew", file=sys.stderr)
    return Results(command, what, environment.describe())
