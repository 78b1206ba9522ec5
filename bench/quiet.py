"""`python -m bench quiet`: nothing arrives at one rank for a while; do the others wait for it?"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import count
from pathlib import Path
from statistics import median

from tqdm import tqdm

from bench import environment
from bench.launchers import Interpreters, plan
from bench.publish import add_options, publish
from bench.table import Table, times
from bench.team import Team, TeamFailed

ABOUT = """\
Measure latencies of an open loop in which every rank has batches of its own, and nothing arrives at rank 1 for a while:
99th percentiles of the other ranks' latencies, from arrival to prediction, next to runs in which it never falls silent,
in turns. `while silent` counts only what arrived in that while, and in the other runs what arrived in the same while.
"""
MODEL = "--arch-mlp-bot 13-64-16 --arch-mlp-top 64-1 --input sharded --arrival fixed"
BEGIN = 1.0  # seconds after the start: rank 1 falls silent


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "quiet", help="latencies while one rank has no arrivals", description=ABOUT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    parser.add_argument("--ranks", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--lag", type=int, default=2, help="(%(default)s)")
    parser.add_argument("--rate", type=int, default=100, help="batches that arrive in a second at each rank (100)")
    parser.add_argument("--batch", type=int, default=32, help="samples of a batch, at each rank (%(default)s)")
    parser.add_argument("--silence", type=float, default=1.0, metavar="S", help="seconds without arrivals (1)")
    parser.add_argument("--repeat", type=int, default=5, help="repetitions (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    add_options(parser, "quiet")


def run(options: argparse.Namespace) -> int:
    """Exit status 1 when something failed."""
    facts = environment.describe()
    batches = round(options.rate * (2 * BEGIN + options.silence))
    flags = [
        *MODEL.split(), *f"--arrival-rate {options.rate} --num-batches {batches} --lag {options.lag}".split(),
        "--mini-batch-size", str(options.batch * options.ranks),
    ]  # fmt: skip
    plans = {"always busy": "none", "rank 1 silent": f"1:{BEGIN}s:{options.silence}s"}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in plans}
    team = Team("bls", options.ranks, plan("bls", options.ranks, environment.cores(), Interpreters()))
    jobs = count()
    try:
        team.ready()
        team.call("run", function="bench.inference_rank:load", name="ours", flags=flags, alone=False)
        with tqdm(total=2 * options.repeat, unit="run", disable=None, leave=False) as bar:
            for _ in range(options.repeat):
                for name, text in plans.items():
                    replies = team.call(
                        "run", function="bench.inference_rank:open_loop", name="ours", job=f"quiet-{next(jobs)}",
                        quiet=text, silent=1, window=[BEGIN, BEGIN + options.silence],
                    )  # fmt: skip
                    found[name].append(replies[0])
                    bar.update()
    except TeamFailed as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        team.close()
    arrivals = f"{options.rate} batches of {options.batch} samples a second"
    table = Table(
        f"{options.ranks} ranks, lag {options.lag}; at each {arrivals}, at rank 1 none for {options.silence:g} s",
        ["<latency of the other ranks, ms", *plans, "times"],
        notes=["Medians of the repetitions; in brackets their range. Times: of these medians."],
    )
    for key, label in (("p50", "p50"), ("p99", "p99"), ("p50 while silent",) * 2, ("p99 while silent",) * 2):
        busy, quiet = ([one[key] for one in found[name]] for name in plans)
        cells = [f"{median(some):.2f} ({min(some):.2f}-{max(some):.2f})" for some in (busy, quiet)]
        table.rows.append([label, *cells, times(median(quiet) / median(busy))])
    about = [
        *environment.disturbed(facts["busy_before"]),
        f"{facts['date']}, commit {facts['commit']}, {facts['cpu']}, {facts['cores']} cores",
        f"load average {facts['load_before']} before; {options.repeat} repetitions of {batches} batches",
    ]
    publish(options, f"python -m bench {' '.join(sys.argv[1:])}", about, [table])
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"environment": facts, "runs": found}, indent=1) + "\n")
    return 0
