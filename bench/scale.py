"""`python -m bench scale`: what an Exchange costs to open and to keep as the number of ranks grows, on one machine."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from bench import environment
from bench.cases import Case, sizes
from bench.launchers import Interpreters, plan
from bench.publish import add_options, publish
from bench.summary import chunk_times
from bench.table import Table, microseconds
from bench.team import Team, TeamFailed
from blsrdma.settings import format_size

ABOUT = "Measure set-up time, memory per rank and time per iteration as the number of ranks grows, on one machine."
_OPENINGS = 3


@dataclass(frozen=True)
class Step:
    """One number of ranks."""

    ranks: int
    start_seconds: float  # of the processes, up to their first word (mostly Python and torch)
    setup_seconds: float  # of one Exchange, the slowest rank; median of several
    window_bytes: int  # registered per rank
    resident_bytes: int  # per rank, everything (mostly Python and torch)
    nanoseconds: float  # per iteration
    checked_bytes: int


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command's options."""
    parser = commands.add_parser("scale", help="set-up time and memory as ranks grow", description=ABOUT)
    parser.set_defaults(run=run)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="(2 4 8 16 32)")
    parser.add_argument("--bytes", default="16K", help="to each peer (%(default)s)")
    parser.add_argument("--lag", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    add_options(parser, "scale")


def run(options: argparse.Namespace) -> int:
    facts, steps = environment.describe(), []
    for ranks in options.ranks:
        try:
            steps.append(_measure(Case(ranks, options.bytes, options.lag)))
        except TeamFailed as error:
            print(error, file=sys.stderr)
            return 1
    about = [*environment.disturbed(facts["busy_before"]),
             f"{facts['date']}, commit {facts['commit']}, {facts['cpu']}, {facts['cores']} cores",
             f"load average {facts['load_before']} before"]  # fmt: skip
    table = Table(
        f"blsrdma as ranks grow: {options.bytes} to each peer, lag {options.lag}",
        ["ranks", "set-up ms", "windows each", "resident each", "µs per iteration", "ns per message", "start s"],
        notes=[
            f"Set-up: of an Exchange, the slowest rank, median of {_OPENINGS}.",
            "Resident and start: mostly Python and torch.",
            "Windows: 2 (lag + 1) (ranks - 1) of them with their headers, and counters.",
            "Every byte of the first iterations was checked.",
        ],
    )
    for step in steps:
        messages = step.ranks * (step.ranks - 1)
        table.rows.append([
            str(step.ranks), f"{step.setup_seconds * 1000:.0f}", format_size(step.window_bytes),
            format_size(step.resident_bytes), microseconds(step.nanoseconds), f"{step.nanoseconds / messages:,.0f}",
            f"{step.start_seconds:.1f}",
        ])  # fmt: skip
    publish(options, f"python -m bench {' '.join(sys.argv[1:])}", about, [table])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(
            json.dumps({"environment": facts, "steps": [asdict(s) for s in steps]}, indent=1) + "\n"
        )
    if options.plot:
        _draw(steps, f"{options.bytes} to each peer, lag {options.lag}, commit {facts['commit']}", options.plot)
    return 0


def _measure(case: Case) -> Step:
    began = time.monotonic()
    table = sizes(case).tolist()
    team = Team("bls", case.ranks, plan("bls", case.ranks, environment.cores(), Interpreters()))
    try:
        team.ready()
        started = time.monotonic() - began
        setups = []
        for opening in range(_OPENINGS):
            name = f"scale-{opening}"
            opened = team.call("open", name=name, system="bls", lag=case.lag, copy_self=False, sizes=table)
            setups.append(max(reply["facts"]["setup_seconds"] for reply in opened))
            if opening == 0:
                checked = team.call("verify", name=name, turns=2 * (case.lag + 1) + 1)
                timed = team.call("time", name=name, warm=10, chunks=10, turns=3 * (case.lag + 1), read=False)
            shut = team.call("shut", name=name)
        return Step(
            case.ranks, started, median(setups), shut[0]["facts"]["memory_bytes"],
            int(median(reply["facts"]["resident_bytes"] for reply in shut)),
            median(chunk_times([reply["stamps"] for reply in timed], 3 * (case.lag + 1))),
            sum(reply["checked_bytes"] for reply in checked),
        )  # fmt: skip
    finally:
        team.close()


def _draw(steps: list[Step], title: str, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    ranks = [step.ranks for step in steps]
    for axes, what, values in (
        (panels[0], "set-up of an Exchange, ms", [step.setup_seconds * 1000 for step in steps]),
        (panels[1], "windows per rank, MiB", [step.window_bytes / 2**20 for step in steps]),
        (panels[2], "µs per iteration", [step.nanoseconds / 1000 for step in steps]),
    ):
        axes.plot(ranks, values, marker="o", color="#d1495b")
        axes.set_title(what, fontsize=10)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ranks, [str(count) for count in ranks])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.set_xlabel("ranks")
        axes.grid(which="both", linewidth=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
