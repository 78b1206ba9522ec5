"""`python -m bench dlrm`: inference of a whole model over ranks, next to processes that need not talk to each other."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from bench import environment
from bench.launchers import Interpreters, plan
from bench.publish import add_options, publish
from bench.summary import Summary, ratio, summarise
from bench.table import Table
from bench.team import Team, TeamFailed

ABOUT = """\
Measure DLRM inference on one machine, every rank with one thread: ours over 2 and 4 ranks at several lags, next to

  independent       two processes at the same time, each with the whole model, on half the batch each: no exchange;
                    and as many as there are ranks, which tells what sharing cores costs by itself
  1 process         one process with the whole model, with 1 and with 2 threads
  plain             the same three as anybody would write them in torch

in one run: all are started first, and in each repetition every one serves the same batches once, in an order that
shifts, while the others sleep. Before that, digests of pooled vectors and logits are compared, and the probabilities of
plain torch. The shape is that of the reference in its own benchmarks.
"""
EXAMPLES = """\
examples:
  python -m bench dlrm --quick                                     a first look
  python -m bench dlrm --lookups 1 20 --json out/dlrm.json --document docs/dlrm.md
"""
MODEL = {"arch-mlp-bot": "13-512-256-64", "arch-mlp-top": "512-256-1", "arch-sparse-feature-size": "64"}
TABLES = 26
PHASES = ("read", "post", "wait", "assemble", "lookup", "dense")
_RANK = "bench.inference_rank"


@dataclass(frozen=True)
class Entry:
    """One line of the table. ranks 0: processes that each have the whole model."""

    name: str
    ranks: int = 0
    lag: int = 0
    processes: int = 1
    threads: int = 1
    plain: bool = False

    @property
    def team(self) -> int:
        """Which ranks it runs on, by their number."""
        return self.ranks or max(2, self.processes)


@dataclass
class Measured:
    """An entry's repetitions: seconds per sample of all its processes together, and shares of their time by phase."""

    entry: Entry
    seconds: list[float] = field(default_factory=list)
    shares: list[dict[str, float]] = field(default_factory=list)
    worked: list[float] = field(default_factory=list)  # share of processor time in lookups and dense
    cpu: list[float] = field(default_factory=list)  # seconds of all processes, per sample
    leads: list[int] = field(default_factory=list)

    @property
    def summary(self) -> Summary:
        """Samples per second."""
        return summarise([1 / seconds for seconds in self.seconds])


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "dlrm", help="inference of a whole model over ranks", description=ABOUT, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], help="(2 4)")
    parser.add_argument("--lags", type=int, nargs="+", default=[0, 1, 2, 4], help="(0 1 2 4)")
    parser.add_argument("--lookups", type=int, nargs="+", default=[1], help="rows in each bag, a table for each (1)")
    parser.add_argument("--batch", type=int, default=2048, help="samples, of all ranks together (%(default)s)")
    parser.add_argument("--batches", type=int, default=32, help="in a repetition (%(default)s)")
    parser.add_argument("--rows", type=int, default=100_000, help="of each of the 26 tables (%(default)s)")
    parser.add_argument("--dense-kernel", choices=["torch", "onednn"], default="torch", help="ours (%(default)s)")
    parser.add_argument("--repeat", type=int, default=7, help="repetitions (%(default)s)")
    parser.add_argument(
        "--bind",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="each process with one thread has a core, in turns, as mpirun and srun do by default",
    )
    parser.add_argument("--quick", action="store_true", help="2 ranks, lags 0 and 1, 3 repetitions of 8 batches")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    add_options(parser, "dlrm")


def run(options: argparse.Namespace) -> int:
    """Exit status 1 when something failed."""
    if options.quick:
        options.ranks, options.lags, options.repeat, options.batches = [2], [0, 1], 3, 8
    facts, tables, found = environment.describe(), [], {}
    others: list[float] = []
    try:
        for lookups in options.lookups:
            measured, busy = _measure(options, lookups)
            found[lookups] = measured
            others += busy
            tables.append(_table(options, lookups, measured))
    except TeamFailed as error:
        print(error, file=sys.stderr)
        return 1
    about = [
        *environment.disturbed(median(others)),
        f"{facts['date']}, commit {facts['commit']}, Python {facts['python']}, Linux {facts['kernel']}",
        f"{facts['cpu']}, {facts['cores']} cores; {facts['caches']}",
        f"cores that other processes kept busy: median {median(others):.2f}, at most {max(others):.2f}",
        f"26 tables of {options.rows:,} rows, dim 64; bottom 13-512-256-64, top 512-256-1",
        f"batch {options.batch:,}; {options.batches} batches in a repetition, {options.repeat} repetitions",
        f"MLPs of ours multiplied by {options.dense_kernel}",
    ]
    publish(options, f"python -m bench {' '.join(sys.argv[1:])}", about, tables)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        data = {str(lookups): [asdict(one) for one in measured] for lookups, measured in found.items()}
        options.json.write_text(json.dumps({"environment": facts, "others": others, "lookups": data}, indent=1) + "\n")
    return 0


def entries(ranks: list[int], lags: list[int]) -> list[Entry]:
    """What is measured, in the order of the table."""
    alone = [
        Entry(f"{'plain torch, ' if plain else ''}{what}", plain=plain, processes=processes, threads=threads)
        for plain in (True, False)
        for what, processes, threads in (
            ("1 process", 1, 1), ("1 process, 2 threads", 1, 2), ("2 independent processes", 2, 1),
        )
    ]  # fmt: skip
    alone += [Entry(f"{count} independent processes", processes=count) for count in ranks if count > 2]
    ours = [Entry(f"{count} ranks, lag {lag}", count, lag) for count in ranks for lag in lags]
    return [*alone, *ours]


def _measure(options: argparse.Namespace, lookups: int) -> tuple[list[Measured], list[float]]:
    """Everything, and how many cores others kept busy in each repetition."""
    model = MODEL | {
        "arch-embedding-size": "-".join([str(options.rows)] * TABLES),
        "num-indices-per-lookup": str(lookups), "num-batches": str(options.batches),
        "mini-batch-size": str(options.batch), "data-generation": "random", "dense-kernel": options.dense_kernel,
    }  # fmt: skip
    flags = [*(word for name, value in model.items() for word in (f"--{name}", value)),
             "--num-indices-per-lookup-fixed"]  # fmt: skip
    jobs = (f"dlrm-{number}" for number in count())
    teams: dict[int, Team] = {}
    try:
        for ranks in sorted({2, *options.ranks}):
            teams[ranks] = Team("bls", ranks, plan("bls", ranks, environment.cores(), Interpreters()))
        for ranks, team in teams.items():
            team.ready()
            if ranks in options.ranks:
                _call(team, "load", name="ours", flags=flags, alone=False, limit=300.0)
        for ranks in {2, *options.ranks}:
            _call(teams[ranks], "load", name="alone", flags=flags, alone=True, limit=300.0)
        _check(teams, options.ranks, jobs)
        chosen = [Measured(entry) for entry in entries(options.ranks, options.lags)]
        busy = []
        total = len(chosen) * options.repeat
        with tqdm(total=total, unit="run", disable=None, leave=False) as bar:
            for repetition in range(options.repeat):
                for number in range(len(chosen)):
                    one = chosen[(number + repetition) % len(chosen)]
                    busy.append(
                        _time(one, teams[one.entry.team], next(jobs), options.batch, options.bind, repetition % 2 == 1)
                    )
                    bar.update()
        return chosen, busy
    finally:
        for team in teams.values():
            team.close()


def _call(team: Team, function: str, limit: float = 120.0, **arguments: Any) -> list[dict[str, Any]]:
    return team.call("run", function=f"{_RANK}:{function}", limit=limit, **arguments)


def _check(teams: dict[int, Team], ranks: list[int], jobs: Any) -> None:
    """The same bits of pooled vectors everywhere, and plain torch close to them. Raises TeamFailed."""
    (wanted, *_) = (reply for reply in _call(teams[2], "check", name="alone", job=next(jobs)) if reply)
    for count_ in ranks:
        found = _call(teams[count_], "check", name="ours", job=next(jobs))[0]
        if found["pooled_sha256"] != wanted["pooled_sha256"]:
            raise TeamFailed(f"{count_} ranks: other pooled vectors than those of one process")
    _call(teams[2], "check_plain", name="alone")


def _time(one: Measured, team: Team, job: str, batch: int, bind: bool, profile: bool) -> float:
    """One repetition; how many cores others kept busy meanwhile. With a profile its wall times by phase do not count:
    asking for processor time is where the system lets another process have its turn."""
    entry = one.entry
    size = batch // entry.processes if not entry.ranks else batch
    replies = [
        reply
        for reply in _call(
            team, "serve", name="ours" if entry.ranks else "alone", job=job, plain=entry.plain,
            processes=entry.processes, threads=entry.threads, batch=size, lag=entry.lag,
            bind=bind, profile=profile,
        )
        if reply
    ]  # fmt: skip
    one.seconds.append(1 / sum(reply["samples"] / reply["seconds"] for reply in replies))
    one.cpu.append(sum(map(_cpu_seconds, replies)) / sum(reply["samples"] for reply in replies))
    if entry.plain:
        return environment.busy_cores(0.05)
    spent = [phases for reply in replies for phases in reply["phases_ms"]]
    whole = 1e3 * sum(reply["seconds"] * len(reply["phases_ms"]) for reply in replies)
    if profile:
        # With more threads than one the phases count only that of the first.
        busy = [phases for reply in replies for phases in reply["phases_cpu_ms"]]
        worked = sum(phases["lookup"] + phases["dense"] for phases in busy) / 1e3
        one.worked.append(worked / sum(map(_cpu_seconds, replies)))
    else:
        one.shares.append({name: sum(phases[name] for phases in spent) / whole for name in PHASES})
    one.leads.append(max(reply["max_lead_seen"] for reply in replies))
    return environment.busy_cores(0.05)


def _cpu_seconds(reply: dict[str, Any]) -> float:
    return float(np.sum(reply["cpu_seconds"]))


def _table(options: argparse.Namespace, lookups: int, measured: list[Measured]) -> Table:
    by_name = {one.entry.name: one for one in measured}
    table = Table(
        f"DLRM inference, {lookups} row{'s' if lookups > 1 else ''} in each bag",
        ["<", "samples/s", "of 2 independent", "of 2 threads", "µs of CPU/sample", "outside", "of CPU", *PHASES],
        notes=[
            "Samples/s: medians of the repetitions ± half the interquartile range.",
            "Ratios to ours in 2 independent processes, and in 1 process with 2 threads: of medians, and their range.",
            "Phases: shares of the ranks' time, medians. Dense: MLPs and interaction.",
            "Outside: of lookups and dense (read, post, wait, assemble, and what no phase counts). Of CPU: the same",
            "share of processor time, the one to go by where ranks share cores: the others' turns come in any phase.",
        ],
    )
    for one in measured:
        summary = one.summary
        cells = [one.entry.name, f"{summary.median:,.0f} ± {100 * summary.spread:.0f} %"]
        for base in ("2 independent processes", "1 process, 2 threads"):
            against = ratio(base, [by_name[base].seconds[i : i + 1] for i in range(options.repeat)],
                            [one.seconds[i : i + 1] for i in range(options.repeat)])  # fmt: skip
            cells.append(f"{against.value:.2f} ({against.low:.2f}-{against.high:.2f})")
        cells.append(f"{1e6 * median(one.cpu):.2f}")
        if one.shares:
            outside = median(1 - share["lookup"] - share["dense"] for share in one.shares)
            counted = one.worked and one.entry.threads == 1
            cells += [_percent(outside), _percent(1 - median(one.worked)) if counted else ""]
            cells += [_percent(median(share[name] for share in one.shares)) for name in PHASES]
        else:
            cells += [""] * (2 + len(PHASES))
        table.rows.append(cells)
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
