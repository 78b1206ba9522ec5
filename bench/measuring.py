"""What the commands that measure exchanges share: options, results that can be resumed, the harness with a bar."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from bench import environment, systems
from bench.cases import IRREGULAR, Case, size_option
from bench.harness import Effort, Harness
from bench.launchers import Interpreters
from bench.publish import add_options as add_publishing
from bench.results import Results

Add = Callable[..., object]


def add_options(parser: argparse.ArgumentParser, command: str, lags: str, chosen: Sequence[str]) -> None:
    """Those of every such command. lags: the usual ones, in words; chosen: the systems that are usual."""
    add: Add = parser.add_argument
    add("--ranks", type=int, nargs="+", help="numbers of ranks (2 4 8; fewer with --quick)")
    kinds = ", ".join(IRREGULAR)
    add("--bytes", type=size_option, nargs="+", help=f"to each peer; {kinds}, or zipf:MEAN, for irregular ones")
    add("--lags", type=int, nargs="+", help=f"({lags})")
    add("--systems", nargs="+", choices=list(systems.SYSTEMS), default=list(chosen), metavar="SYSTEM",
        help=f"see alltoallv --help ({' '.join(chosen)})")  # fmt: skip
    add("--repeat", type=int, help="repetitions (5; 2 with --quick)")
    add("--seconds", type=float, help="of one system in one undelayed repetition (0.25; 0.04 with --quick)")
    add("--quick", action="store_true", help="little time")
    add("--json", type=Path, metavar="FILE", help="write everything, after each case")
    add("--resume", action="store_true", help="keep the cases that FILE already has")
    add("--plot", type=Path, metavar="FILE", help="write a picture")
    add_publishing(parser, command)
    add_interpreters(parser)


def add_interpreters(parser: argparse.ArgumentParser) -> None:
    """Where the MPIs are."""
    for kind in ("mpich", "openmpi"):
        parser.add_argument(f"--{kind}-python", metavar="PYTHON",
                            help=f"interpreter with mpi4py and {kind} (BENCH_{kind.upper()}_PYTHON, or .venv-{kind}, "
                            "which `python -m bench peers` makes)")  # fmt: skip


def fill_in(options: argparse.Namespace, usual: dict[str, object]) -> None:
    """What was not given."""
    for name, value in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def begin(options: argparse.Namespace, what: dict[str, object]) -> Results:
    """New results, or with --resume those that --json has of the same options and commit."""
    command = "python -m bench " + " ".join(sys.argv[1:])
    results = Results(command, what, environment.describe())
    if options.resume and options.json and options.json.exists():
        earlier = Results.load(options.json)
        same = earlier.environment.get("commit", "").rstrip("+") == environment.commit().rstrip("+")
        if earlier.options == what and same:
            results = earlier
        else:
            print(f"{options.json} is of other options or another commit: begun anew", file=sys.stderr)
    for warning in environment.disturbed(results.environment["busy_before"]):
        print(warning, file=sys.stderr)
    return results


def measure(
    results: Results, cases: Sequence[Case], chosen: list[str], effort: Effort, interpreters: Interpreters,
    json: Path | None = None, transport: str = "default", label: str = "",
) -> None:  # fmt: skip
    """Measure the cases that `results` lacks, with a progress bar; saved to `json` after each."""
    done = set(results.cases())
    cases = [case for case in cases if case not in done]

    def save() -> None:
        if json:
            results.save(json)

    total = len(cases) * len(chosen) * effort.repeat
    with tqdm(total=total, unit="block", desc=label or None, disable=None, leave=False) as bar:
        harness = Harness(
            results, chosen, effort, interpreters, transport,
            report=lambda text: bar.write(text, file=sys.stderr), step=bar.update,
        )  # fmt: skip
        harness.run(cases, done=save)
    results.environment["load_after"] = environment.load()
    save()


def failed(results: Results) -> bool:
    """Whether a system failed (not when it is absent), or there is nothing."""
    return any("failed at" in reason for reason in results.skipped.values()) or not results.measurements
