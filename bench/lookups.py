"""`python -m bench lookups`: lookups by a collective, by requests to the owners, and by reading the owners' rows."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from tqdm import tqdm

from bench import environment
from bench.launchers import Interpreters, plan
from bench.lookup_rank import Work
from bench.publish import add_options, publish
from bench.table import Table
from bench.team import Team, TeamFailed
from blsrdma.lag import max_plus

ABOUT = """\
The same lookups in every system, on ranks of this machine, each of which has samples of its own: a bag of every table
for each sample.

  alltoallv  two Exchanges: bags to the owners, pooled rows back; owners answer in their own loops
  put        Lookup, mode put: owners answer apart from their loops
  get        Lookup, mode get: requesters read the rows

Values are checked, every bit, before time is taken. Repetitions go round the systems. Delays are injected into the
ranks' own loops and counted as they were really slept.
"""
EXAMPLES = """\
examples:
  python -m bench lookups --quick                                              a first look, half a minute
  python -m bench lookups --json out/lookups.json --plot out/lookups.png
  python -m bench lookups --document docs/lookups.md --plot docs/lookups.png   what the document shows
"""
SYSTEMS = ("alltoallv", "put", "get")
EXPONENTIAL, ROTATING, ONE = "exp:p=0.1,mean=2ms", "rotate:every=10,time=10ms", "one:p=0.02,time=50ms"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "lookups", help="pooled lookups, with a collective and without", description=ABOUT, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    parser.add_argument("--ranks", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--lag", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--samples", type=int, default=128, help="of one rank in one iteration (%(default)s)")
    parser.add_argument("--tables", type=int, default=8, help="(%(default)s)")
    parser.add_argument("--rows", type=int, default=20_000, help="of a table (%(default)s)")
    parser.add_argument("--dim", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--pooling", type=int, default=4, help="rows in a bag (%(default)s)")
    parser.add_argument("--iterations", type=int, help="in one repetition (300; 100 with --quick)")
    parser.add_argument("--repeat", type=int, help="repetitions (3; 2 with --quick)")
    parser.add_argument("--outage", type=float, default=2.0, metavar="S", help="for so long one owner is stopped (2)")
    parser.add_argument("--quick", action="store_true", help="little time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a picture")
    add_options(parser, "lookups")


ZIPF = "zipf 1.05, all tables at rank 0, over TCP"
# What there is to move less, each alone.
LESS: dict[str, dict[str, Any]] = {
    "put, pooled": {},
    "put, rows": {"fetch": "rows", "dedupe": False},
    "put, rows once": {"fetch": "rows"},
    "put, rows once, cache": {"fetch": "rows", "cache_bytes": 8 << 20},
    "put, rows once, hot rows": {"fetch": "rows", "hot": 4000},
}


class Runs:
    """Measurements, with what they found: results[case, system] has one entry a repetition. `team` makes them."""

    team: Team

    def __init__(self, work: Work, options: argparse.Namespace) -> None:
        self._work, self._options = work, options
        self._names = count()
        self.skewed = replace(work, zipf=1.05, owners=[0] * work.tables, samples=4 * work.samples, pooling=1)
        self.results: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def measure(
        self, case: str, system: str, lag: int, delay: str, seed: int, label: str = "", work: Work | None = None,
        **settings: Any,
    ) -> None:  # fmt: skip
        """One repetition of one system, called `label`."""
        ranks = self.team.call(
            "run", function="bench.lookup_rank:measure", system=system, work=asdict(work or self._work), lag=lag,
            name=f"lookups-{next(self._names)}", iterations=self._options.iterations, delay=delay, seed=seed,
            settings=settings, verify=seed == 0,
        )  # fmt: skip
        slept = np.array([rank["slept"] for rank in ranks]) / 1e6
        latency = np.array([rank["latency"] for rank in ranks]) / 1e6
        asleep = slept.sum(axis=1) > 0
        self._keep(case, label or system, {
            "ms": max(rank["ns"] for rank in ranks) / 1e6 / self._options.iterations, "slept": slept.tolist(),
            "p50": float(np.percentile(latency, 50)), "checked": sum(rank["checked"] for rank in ranks),
            "p99_awake": float(np.percentile(latency[~asleep], 99)) if not asleep.all() else None,
            "paths": ranks[0]["paths"], "carried": sum(rank.get("carried", 0) for rank in ranks),
            "counts": {what: sum(rank["counts"][what] for rank in ranks) for what in ranks[0].get("counts", {})},
        })  # fmt: skip

    def outage(self, case: str, system: str, stopped: bool) -> None:
        """How many iterations the others make a second while the last rank asks nothing."""
        seconds = self._options.outage
        ranks = self.team.call(
            "run", function="bench.lookup_rank:outage", system=system, work=asdict(self._work), lag=self._options.lag,
            name=f"lookups-{next(self._names)}", seconds=seconds, stopped=stopped, settings={},
        )  # fmt: skip
        self._keep(case, system, {"per_second": sum(rank["iterations"] for rank in ranks) / seconds})

    def _keep(self, case: str, system: str, found: dict[str, Any]) -> None:
        self.results.setdefault((case, system), []).append(found)

    def median(self, case: str, system: str, what: str = "ms") -> float:
        """Of the repetitions."""
        return median(float(each[what]) for each in self.results[case, system])


def plans(options: argparse.Namespace, runs: Runs) -> Iterator[Callable[[], None]]:
    """Every measurement, in order: repetitions outermost."""
    lag = options.lag
    cases = [("undelayed", lag, "none"), ("undelayed, lag 0", 0, "none"), ("exponential", lag, EXPONENTIAL),
             ("rotating", lag, ROTATING), ("one sleeps", lag, ONE), ("one sleeps, lag 0", 0, ONE)]  # fmt: skip
    for repetition in range(options.repeat):
        for case, depth, delay in cases:
            for k in range(len(SYSTEMS)):
                system = SYSTEMS[(k + repetition) % len(SYSTEMS)]
                yield lambda a=(case, system, depth, delay, repetition): runs.measure(*a)  # type: ignore[misc]
        if repetition < 3:
            for stopped in (False, True):
                case = "owner stopped" if stopped else "owner idle"
                yield lambda a=(case, "get", stopped): runs.outage(*a)  # type: ignore[misc]


def skewed_plans(options: argparse.Namespace, runs: Runs) -> Iterator[Callable[[], None]]:
    """The same for LESS."""
    for repetition in range(options.repeat):
        for label, settings in LESS.items():
            yield lambda a=(ZIPF, "put", options.lag, "none", repetition, label, runs.skewed), s=settings: runs.measure(  # type: ignore[misc]
                *a, **s
            )


def run(options: argparse.Namespace) -> int:
    """Exit status 1 when something failed."""
    options.iterations = options.iterations or (100 if options.quick else 300)
    options.repeat = options.repeat or (2 if options.quick else 3)
    ranks = options.ranks
    owners = [table * ranks // options.tables for table in range(options.tables)]
    work = Work(ranks, options.samples, options.tables, options.rows, options.dim, options.pooling, 0.0, owners)
    facts = environment.describe()
    for warning in environment.disturbed(facts["busy_before"]):
        print(warning, file=sys.stderr)
    runs = Runs(work, options)
    try:
        for transport, planned in (("default", plans), ("tcp", skewed_plans)):
            with contextlib.closing(
                Team("bls", ranks, plan("bls", ranks, environment.cores(), Interpreters(), transport))
            ) as team:
                team.ready()
                runs.team = team
                for step in tqdm(list(planned(options, runs)), unit="run", disable=None, leave=False):
                    step()
    except TeamFailed as error:
        print(error, file=sys.stderr)
        return 1
    facts["load_after"] = environment.load()
    command = "python -m bench " + " ".join(sys.argv[1:])
    values = {"command": command, "environment": facts, "work": asdict(work), "lag": options.lag,
              "iterations": options.iterations,
              "results": [{"case": c, "system": s, "runs": r} for (c, s), r in runs.results.items()]}  # fmt: skip
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(values) + "\n")
    publish(options, command, about(facts, work, options), [times(runs, options), less(runs), reach(runs, options)])
    if options.plot:
        from bench.lookup_plot import draw

        draw(runs, options, facts, options.plot)
    return 0


def about(facts: dict[str, Any], work: Work, options: argparse.Namespace) -> list[str]:
    """What the numbers are of."""
    return [
        *environment.disturbed(facts["busy_before"]),
        f"{facts['date']}, commit {facts['commit']}, {facts['cpu']}, {facts['cores']} cores",
        f"load average {facts['load_before']} before, {facts['load_after']} after",
        f"{work.ranks} ranks, each {work.samples} samples an iteration",
        f"{options.repeat} repetitions of {options.iterations} iterations",
        f"{work.tables} tables of {work.rows:,} rows x {work.dim} (fp32), bags of {work.pooling}",
    ]


def cost(runs: Runs) -> float:
    """c of the model: the smallest undelayed time per iteration of any system, in ms."""
    return min(runs.median(case, system) for case in ("undelayed", "undelayed, lag 0") for system in SYSTEMS)


def models(run: dict[str, Any], lag: int, c: float) -> tuple[float, float, float]:
    """ms per iteration of the delays as they were slept: synchronous, with the lag, without any synchronisation."""
    slept = np.array(run["slept"])
    synchronous, bounded, free = (
        float(max_plus(slept, k, c)[:, -1].max() / slept.shape[1]) for k in (0, lag, float("inf"))
    )
    return synchronous, bounded, free


def times(runs: Runs, options: argparse.Namespace) -> Table:
    """Time per iteration next to the models."""
    c = cost(runs)
    table = Table(
        "ms per iteration (medians)",
        ["<case", "<system", "ms", "of all runs", "synchronous", f"lag {options.lag}", "no synchronisation", "ratio"],
        notes=[f"The models' c is {c:.3f} ms: the smallest undelayed time of any system here.",
               "ratio: measured / no synchronisation, of each run's own delays."],
    )  # fmt: skip
    for (case, system), found in runs.results.items():
        if "ms" not in found[0] or case == ZIPF:
            continue
        values = sorted(each["ms"] for each in found)
        each_model = [models(each, options.lag, c) for each in found]
        ratios = [each["ms"] / model[2] for each, model in zip(found, each_model, strict=True)]
        cells = [f"{median(model[k] for model in each_model):.3f}" for k in range(3)]
        table.rows.append([case, system, f"{median(values):.3f}", f"{values[0]:.3f} – {values[-1]:.3f}", *cells,
                           f"{median(ratios):.2f}"])  # fmt: skip
    return table


def less(runs: Runs) -> Table:
    """What a skewed load gains from moving less."""
    table = Table(
        f"{ZIPF}, bags of one row, {runs.skewed.samples} samples a rank: moving less (medians)",
        ["<system", "ms", "speed", "MB moved", "rows fetched", "kept here", "cached", "repeated"],
        notes=["Of the rows that ranks wanted of rank 0; moved: requests and responses, preparation included.",
               "Hot rows: the 4000 of each table that were most frequent in 40 other batches of the rank."],
    )  # fmt: skip
    plain = runs.median(ZIPF, "put, pooled")
    for label in LESS:
        run = runs.results[ZIPF, label][-1]
        counts = run["counts"]
        shares = [f"{counts[what] / counts['rows']:.0%}" for what in ("fetched", "kept", "cached", "repeated")]
        if label == "put, pooled":
            shares = ["–"] * 4
        ms = runs.median(ZIPF, label)
        table.rows.append([label, f"{ms:.3f}", f"{plain / ms:.2f}", f"{run['carried'] / 1e6:.1f}", *shares])
    return table


def ratio(runs: Runs, case: str, system: str, options: argparse.Namespace) -> float:
    """Measured / the model without synchronisation: the median over repetitions."""
    c = cost(runs)
    return median(float(each["ms"]) / models(each, options.lag, c)[2] for each in runs.results[case, system])


def reach(runs: Runs, options: argparse.Namespace) -> Table:
    """What was to be reached, and what was."""
    table = Table("Goals", ["<what", "goal", "put", "get", "alltoallv"])

    def row(what: str, goal: str, value: Callable[[str], str]) -> None:
        table.rows.append([what, goal, *(value(system) for system in ("put", "get", "alltoallv"))])

    row("exponential delays: time / no synchronisation", "<= 1.15",
        lambda s: f"{ratio(runs, 'exponential', s, options):.2f}")  # fmt: skip
    row("rotating straggler: time / no synchronisation", "<= 1.15",
        lambda s: f"{ratio(runs, 'rotating', s, options):.2f}")  # fmt: skip

    def p99(system: str, depth: str, undelayed: str) -> str:
        calm = median(float(np.percentile([each["p99_awake"]], 50)) for each in runs.results[undelayed, system])
        return f"{runs.median('one sleeps' + depth, system, 'p99_awake') / calm:.2f}"

    row("p99 latency of the others while one sleeps / undelayed", "<= 1.2", lambda s: p99(s, "", "undelayed"))
    row("the same, lag 0", "<= 1.2", lambda s: p99(s, ", lag 0", "undelayed, lag 0"))
    best = min(runs.median(case, "alltoallv") for case in ("undelayed", "undelayed, lag 0"))
    row("undelayed: speed / alltoallv at its best lag", ">= 0.95",
        lambda s: f"{best / min(runs.median(case, s) for case in ('undelayed', 'undelayed, lag 0')):.2f}")  # fmt: skip
    hot = runs.median(ZIPF, "put, pooled") / runs.median(ZIPF, "put, rows once, hot rows")
    row(f"{ZIPF}: speed with hot rows / without", ">= 2", lambda s: f"{hot:.2f}" if s == "put" else "–")
    pace = runs.median("owner stopped", "get", "per_second") / runs.median("owner idle", "get", "per_second")
    row("one owner stopped: others' pace / owner idle", ">= 1", lambda s: f"{pace:.2f}" if s == "get" else "–")
    return table
