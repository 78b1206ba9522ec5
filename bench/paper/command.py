"""`python -m bench paper`: all experiments, in parts that are kept, and a report of what they say."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import environment, measuring
from bench.launchers import Interpreters
from bench.paper import dlrm as models
from bench.paper import exact, synthetic, where
from bench.paper.effort import EFFORTS, Effort
from bench.paper.folder import Folder, Part
from bench.paper.workloads import NAMES, Workload, workloads
from bench.table import console
from bench.team import TeamFailed

ABOUT = """\
The experiments behind every claim of this project, and of the paper that its idea is from, in one command:

  synthetic   an all-to-all alone: sizes of all kinds, delays of all kinds, each lag; MPI, gloo, the model, the floors
  dlrm-...    a whole model: generated and real data, undelayed and delayed, closed loop and open loop
  where       where a lag helps and where not: measured, and simulated for up to 1,024 ranks
  exact       the same bits whatever brings them

Parts that are done are kept in --out, and measured again only where settings or commit differ: an interrupted run goes
on where it was. What comes out there: raw samples (npz), values (JSON), figures (PNG, SVG), and report.html, which is
one file with everything: environment, commands, goals reached and not, tables, and what was not better.
"""
EXAMPLES = """\
examples:
  python -m bench paper --trial --out out/trial               seconds: whether everything runs; numbers mean nothing
  python -m bench paper --quick                               a quarter of an hour
  python -m bench paper --data folder                         hours; with Criteo's, Ali-CCP's and Meta's files
  python -m bench paper --quick --parts synthetic where       some of it
  python -m bench paper --quick --report --document docs/experiments.md       measures nothing: writes the report again
"""
PARTS = ("synthetic", "dlrm", "where", "exact")


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "paper", help="all experiments, and a report", description=ABOUT, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run, effort="full")
    efforts = parser.add_mutually_exclusive_group()
    for name in ("quick", "trial"):
        what = {"quick": "a quarter of an hour", "trial": "seconds, for nothing but to see that everything runs"}[name]
        efforts.add_argument(f"--{name}", dest="effort", action="store_const", const=name, help=what)
    parser.add_argument("--out", type=Path, default=Path("out/paper"), metavar="DIR", help="(%(default)s)")
    parser.add_argument("--data", type=Path, metavar="DIR", default=os.environ.get("BLSRDMA_TEST_DATA"),
                        help="with files of real data; what is not there is left out (BLSRDMA_TEST_DATA)")  # fmt: skip
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="(all)")
    parser.add_argument("--report", action="store_true", help="measure nothing; report what DIR has")
    parser.add_argument("--document", type=_document, nargs="+", default=[], metavar="FILE",
                        help="write the report into the block `paper` of a Markdown file, its figures beside it, and "
                        "one sentence into a block `paper-headline`")  # fmt: skip
    measuring.add_interpreters(parser)


def _document(text: str) -> Path:
    """Looked at before anything is measured."""
    path = Path(text)
    try:
        if "<!-- bench paper" in path.read_text():
            return path
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    raise argparse.ArgumentTypeError(f"{path} has no line <!-- bench paper --> or <!-- bench paper-headline -->")


def run(options: argparse.Namespace) -> int:
    """Exit status 1 when a part failed."""
    from bench.paper.report import publish

    effort, folder = EFFORTS[options.effort], Folder(options.out)
    data = Path(options.data) if options.data else None
    chosen, absent = workloads(data, options.out / "made")
    if effort.name == "trial":
        chosen = chosen[:1]
    work = Work(options, effort, folder, data)
    if options.report:
        names = ["synthetic", *(f"dlrm-{name}" for name in NAMES), "exact", "where"]
        found = {name: part for name in names if (part := folder.load(name))}
        absent = {name: why for name, why in absent.items() if f"dlrm-{name}" not in found}
    else:
        found = work.all(chosen)
    if not found:
        print(f"{options.out} has no part of a run", file=sys.stderr)
        return 1
    publish(found, work.failures, absent, folder, options.document, work.command)
    return int(bool(work.failures))


def _name(workload: Workload) -> str:
    return f"dlrm-{workload.name}"


@dataclass
class Work:
    """A run."""

    options: argparse.Namespace
    effort: Effort
    folder: Folder
    data: Path | None

    def __post_init__(self) -> None:
        self.failures: dict[str, str] = {}
        data = " --data DIR" if self.data else ""
        self.command = f"python -m bench paper{'' if self.effort.name == 'full' else f' --{self.effort.name}'}{data}"
        self.environment: dict[str, Any] = {} if self.options.report else environment.describe()
        self.interpreters = Interpreters(self.options.mpich_python, self.options.openmpi_python)
        self._teams: models.Teams | None = None
        self._stack = ExitStack()

    def all(self, chosen: list[Workload]) -> dict[str, Part]:
        """Every part that is asked for, measured or kept."""
        for warning in environment.disturbed(self.environment["busy_before"]):
            print(warning, file=sys.stderr)
        found: dict[str, Part | None] = {}
        parts = self.options.parts
        effort = self.effort
        with self._stack:
            if "synthetic" in parts:
                found["synthetic"] = self.part("synthetic", asdict(effort.synthetic), self.synthetic)
            if "dlrm" in parts:
                for one in chosen:
                    settings = asdict(effort.dlrm) | {"workload": asdict(one)}
                    found[_name(one)] = self.part(_name(one), settings, partial(self.dlrm, one))
            if "exact" in parts:
                settings = asdict(effort.dlrm) | {"epochs": effort.fit_epochs, "data": str(self.data)}
                found["exact"] = self.part("exact", settings, self.exact)
            self._stack.pop_all().close()  # the ranks of a model
            if "where" in parts:
                found["where"] = self.part("where", asdict(effort.where), self.where)
        return {name: part for name, part in found.items() if part}

    def part(self, name: str, effort: dict[str, Any], measure: Callable[[Part], None]) -> Part | None:
        """The one that is there, or a new one, saved; None where it failed."""
        settings = {"commit": environment.commit().rstrip("+"), "effort": effort}
        kept = self.folder.load(name, settings)
        if kept:
            print(f"{name}: kept, from {kept.environment['date']}", file=sys.stderr)
            return kept
        part = Part(name, settings, dict(self.environment))
        began = time.monotonic()
        console(stderr=True).print(f"{name} …")
        try:
            measure(part)
        except (TeamFailed, OSError, ValueError) as error:
            self.failures[name] = str(error)
            print(f"{name} failed: {error}", file=sys.stderr)
            return None
        part.seconds = time.monotonic() - began
        part.environment["load_after"] = environment.load()
        self.folder.save(part)
        console(stderr=True).print(f"{name}: {part.seconds:.0f} s")
        return part

    def synthetic(self, part: Part) -> None:
        unfinished = self.folder.path / "synthetic.unfinished.json"
        effort = self.effort.synthetic
        results = synthetic.measure(effort, self.interpreters, unfinished, part.environment, self.command)
        part.values, part.arrays = {"results": asdict(results)}, synthetic.arrays(results)
        part.skipped = results.skipped

    def where(self, part: Part) -> None:
        effort = self.effort.where
        results = synthetic.measured(
            where.cases(effort), ["bls"], where.blocks(effort), self.interpreters,
            self.folder.path / "where.unfinished.json", part.environment, self.command, "where",
        )  # fmt: skip
        part.values = {"results": asdict(results), "ranks": effort.simulated_ranks}
        part.arrays = {**synthetic.arrays(results), **where.maps(effort)}
        part.skipped = results.skipped

    def dlrm(self, workload: Workload, part: Part) -> None:
        teams = self.teams()
        with tqdm(unit="run", desc=part.name, disable=None, leave=False) as bar:

            def step(what: str) -> None:
                bar.set_postfix_str(what)
                bar.update()

            measuring_ = models.Measuring(workload, self.effort.dlrm, teams, step)
            measuring_.measure()
        part.values, part.arrays, part.skipped = measuring_.values, measuring_.arrays, dict(teams.skipped)

    def exact(self, part: Part) -> None:
        model, about = exact.flags(self.data, self.folder.path / "made", self.effort.fit_epochs)
        part.values = exact.measure(self.teams(), model, about, self.effort.dlrm.lags)

    def teams(self) -> models.Teams:
        """The ranks that serve models, started when they are needed."""
        if self._teams is None or not self._teams.has("bls"):
            self._teams = self._stack.enter_context(models.Teams(self.effort.dlrm.ranks, self.interpreters))
        return self._teams
