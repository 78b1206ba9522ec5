"""`python -m bench stress`: a long random run of blsrdma in which every byte is checked."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import time
from pathlib import Path

from tqdm import tqdm

from bench import environment
from bench.launchers import TRANSPORTS, Interpreters, plan
from bench.table import Table, console
from bench.team import Team, TeamFailed
from blsrdma.settings import format_size

ABOUT = """\
Run random exchanges on several ranks of this machine and check every byte of every message.

Sizes are random from none to several windows, with many around whole windows; every few thousand iterations the
Exchange is closed and another one opened with another lag and window; ranks sleep now and then. The seed is printed:
with the same seed, ranks and iterations, the same sizes, lags and windows come again.
"""


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command's options."""
    parser = commands.add_parser("stress", help="random everything, verified", description=ABOUT,
                                 formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.set_defaults(run=run)
    parser.add_argument("--iterations", type=int, help="(20000; 1000 with --quick)")
    parser.add_argument("--ranks", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--seed", type=int, help="(a new one)")
    parser.add_argument("--transport", choices=list(TRANSPORTS), default="default", help="(%(default)s)")
    parser.add_argument("--max-windows", type=int, default=3, help="largest message in windows (%(default)s)")
    parser.add_argument("--delays", type=float, default=0.002, metavar="P",
                        help="probability that a rank sleeps in an iteration (%(default)s)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a short run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the summary")


def run(options: argparse.Namespace) -> int:
    """Exit status 0: everything was right."""
    iterations = options.iterations or (1000 if options.quick else 20_000)
    seed = secrets.randbits(31) if options.seed is None else options.seed
    launch = plan("bls", options.ranks, environment.cores(), Interpreters(), options.transport)
    began = time.monotonic()
    team = Team("bls", options.ranks, launch)
    slowest = [0] * options.ranks
    try:
        team.ready()
        with tqdm(total=iterations, unit="it", disable=None, leave=False) as bar:

            def progress(rank: int, done: int) -> None:
                slowest[rank] = done
                bar.update(min(slowest) - bar.n)

            tallies = team.call(
                "run", function="bench.stress_rank:run", iterations=iterations, seed=seed,
                max_windows=options.max_windows, delays=options.delays, progress=progress,
                limit=120 + iterations * 0.05,
            )  # fmt: skip
    except TeamFailed as error:
        print(error, file=sys.stderr)
        print(f"FAILED with --seed {seed} --ranks {options.ranks} --iterations {iterations} "
              f"--transport {options.transport} --max-windows {options.max_windows}", file=sys.stderr)  # fmt: skip
        return 1
    finally:
        team.close()
    seconds = max(tally["seconds"] for tally in tallies)
    checked = sum(tally["checked_bytes"] for tally in tallies)
    facts = {
        "iterations": f"{iterations:,} on {options.ranks} ranks, each complete on every rank",
        "seed": str(seed),
        "commit": environment.commit(),
        "transport": f"{options.transport}: {', '.join(sorted({p for tally in tallies for p in tally['paths']}))}",
        "messages": f"{iterations * options.ranks**2:,} of 0 to {options.max_windows} windows, every byte right",
        "bytes checked": format_size(checked),
        "exchanges opened": str(tallies[0]["exchanges"]),
        "greatest lead": f"{max(tally['max_lead'] for tally in tallies)} iterations",
        "sleeps": f"{sum(tally['sleeps'] for tally in tallies):,}",
        "time": f"{seconds:.1f} s, {iterations / seconds:,.0f} iterations/s, {format_size(int(checked / seconds))}/s "
                f"(with checking; start and end: {time.monotonic() - began - seconds:.1f} s)",
    }  # fmt: skip
    table = Table("stress: everything was right", ["<what", "<value"], [list(item) for item in facts.items()])
    table.print(console())
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(facts | {"by_rank": tallies}, indent=1) + "\n")
    return 0
