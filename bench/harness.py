"""The order of measurements.

For each number of ranks the teams of all runtimes are started; those that are not measured sleep. For each case every
system first proves its values, then repetitions go round: in each, every system is timed once, in an order that shifts
by one, so that no system has a quiet or a busy time of the machine for itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

from bench.cases import Case, sizes
from bench.environment import busy_seconds, cores, noisy, stolen_seconds
from bench.launchers import Interpreters, Unavailable, plan
from bench.results import Measurement, Results
from bench.summary import chunk_times
from bench.systems import SYSTEMS
from bench.team import Team, TeamFailed
from dlrm import delays

CHUNKS = 100  # of a timed block, each one sample: short ones, so that what interrupts the block spoils few of them
MIN_CHUNKS = 2
ROUNDS = 3  # a chunk is at least so many times the iterations in flight


@dataclass(frozen=True)
class Effort:
    """How long to measure."""

    repeat: int = 5
    seconds: float = 0.25  # of one block of one system
    iterations: int = 500  # of one block with delays
    longer: dict[str, int] = field(default_factory=dict)  # the same for some plans of delays
    again: int = 0  # so many blocks in all may be measured anew, where others disturbed them


@dataclass(frozen=True)
class _Running:
    """A system that is ready for a case."""

    team: Team
    job: str
    result: Measurement
    chunks: int


class Harness:
    """Measures cases and adds what it finds to `results`."""

    def __init__(
        self,
        results: Results,
        systems: list[str],
        effort: Effort,
        interpreters: Interpreters,
        transport: str = "default",
        report: Callable[[str], None] = print,
        step: Callable[[], object] = lambda: None,
    ) -> None:
        self.results, self.systems, self.effort = results, systems, effort
        self.interpreters, self.transport = interpreters, transport
        self.report, self.step = report, step
        self._teams: dict[str, Team] = {}
        self._names = count()
        self._again = effort.again

    def run(self, cases: Iterable[Case], done: Callable[[], None] = lambda: None) -> None:
        """`done` is called after each case."""
        by_ranks: dict[int, list[Case]] = {}
        for case in cases:
            by_ranks.setdefault(case.ranks, []).append(case)
        try:
            for ranks, group in by_ranks.items():
                self._start(ranks)
                for case in group:
                    self._measure(case)
                    done()
                self._stop()
        finally:
            self._stop()

    def _start(self, ranks: int) -> None:
        starting: dict[str, Team] = {}
        for runtime in dict.fromkeys(SYSTEMS[name].runtime for name in self.systems):
            try:
                launch = plan(runtime, ranks, cores(), self.interpreters, self.transport)
            except Unavailable as reason:
                self._skip(runtime, ranks, str(reason))
                continue
            starting[runtime] = Team(runtime, ranks, launch)
            self.results.launch[f"{runtime}, {ranks} ranks"] = launch.settings
        for runtime, team in starting.items():
            try:
                team.ready()
            except TeamFailed as reason:
                self._skip(runtime, ranks, str(reason))
                continue
            self._teams[runtime] = team
            self.results.versions[runtime] = team.versions

    def _stop(self) -> None:
        for team in self._teams.values():
            team.close()
        self._teams = {}

    def _skip(self, runtime: str, ranks: int, reason: str) -> None:
        self.results.skipped[f"{runtime}, {ranks} ranks"] = reason
        self.report(f"{runtime} with {ranks} ranks is left out: {reason}")

    def _measure(self, case: Case) -> None:
        running: dict[str, _Running] = {}
        for system in self.systems:
            if SYSTEMS[system].runtime in self._teams:
                with self._guarded(case, system):
                    running[system] = self._prepare(case, system)
        order = list(running)
        for repetition in range(self.effort.repeat):
            for k in range(len(order)):
                system = order[(k + repetition) % len(order)]
                if SYSTEMS[system].runtime in self._teams:
                    with self._guarded(case, system):
                        self._block(running[system])
                self.step()
        for system, run in running.items():
            if SYSTEMS[system].runtime in self._teams:
                with self._guarded(case, system):
                    self._end(run)
                    self.results.measurements.append(run.result)

    @contextmanager
    def _guarded(self, case: Case, system: str) -> Iterator[None]:
        """A system that fails takes its team out of the rest, with the reason; the others go on."""
        try:
            yield
        except TeamFailed as reason:
            runtime = SYSTEMS[system].runtime
            del self._teams[runtime]
            self._skip(runtime, case.ranks, f"failed at {case.label} ({system}): {reason}")

    def _prepare(self, case: Case, system: str) -> _Running:
        """Open the exchange, prove its values, find out how many turns make a block."""
        team, table, job = self._teams[SYSTEMS[system].runtime], sizes(case), f"{system}-{next(self._names)}"
        copy_self = case.self_message == "copy"
        team.call("open", name=job, system=system, lag=case.lag, copy_self=copy_self, sizes=table.tolist())
        depth = case.lag + 1
        checked = team.call("verify", name=job, turns=max(len(table), 2 * depth) + 1)
        checked_bytes = sum(reply["checked_bytes"] for reply in checked)
        if case.delay != "none":
            turns = self.effort.longer.get(case.delay, self.effort.iterations)
            return _Running(team, job, Measurement(case, system, turns, checked_bytes=checked_bytes), 1)
        turns, per_turn = 2 * depth, 0.0
        for _ in range(3):  # until a chunk is long enough to tell
            replies = team.call("time", name=job, warm=depth, chunks=3, turns=turns, read=case.read)
            per_turn = max(1.0, min(chunk_times([reply["stamps"] for reply in replies], turns)))
            if per_turn * turns > 1e6:
                break
            turns = max(turns, int(2e6 / per_turn))
        block = self.effort.seconds * 1e9
        turns = max(ROUNDS * depth, int(block / CHUNKS / per_turn))
        chunks = min(CHUNKS, max(MIN_CHUNKS, int(block / (turns * per_turn))))
        result = Measurement(case, system, turns, checked_bytes=checked_bytes)
        return _Running(team, job, result, chunks)

    def _block(self, run: _Running) -> None:
        """One repetition; measured anew where others disturbed it, as long as the effort allows."""
        while True:
            began, busy, stolen = time.monotonic(), busy_seconds(), stolen_seconds()
            cpu_seconds, iterations = (self._time if run.result.case.delay == "none" else self._time_delayed)(run)
            busy, wall = busy_seconds() - busy, time.monotonic() - began
            others = max(0.0, (busy - cpu_seconds) / wall)
            if self._again and noisy(others, wall):
                self._again -= 1
                run.result.disturbed.append(others)
                run.result.samples.pop()
                del run.result.stalls[len(run.result.samples) :]
                continue
            run.result.cpu_ns.append(cpu_seconds * 1e9 / iterations)
            run.result.others.append(others)
            run.result.stolen.append(max(0.0, (stolen_seconds() - stolen) / wall))
            return

    def _time(self, run: _Running) -> tuple[float, int]:
        """Adds samples; returns processor seconds of all ranks, and iterations."""
        turns, case = run.result.turns, run.result.case
        warm = max(2 * (case.lag + 1), turns // 2)
        replies = run.team.call("time", name=run.job, warm=warm, chunks=run.chunks, turns=turns, read=case.read)
        run.result.samples.append(chunk_times([reply["stamps"] for reply in replies], turns))
        return sum(reply["cpu_seconds"] for reply in replies), warm + run.chunks * turns

    def _time_delayed(self, run: _Running) -> tuple[float, int]:
        """The same under delays."""
        case, turns, repetition = run.result.case, run.result.turns, len(run.result.samples)
        stalls = delays.parse(case.delay, repetition).table(case.ranks, turns)  # the same for every system
        warm = 2 * (case.lag + 1)
        replies = run.team.call("delayed", name=run.job, warm=warm, stalls=stalls.tolist())
        took = max(reply["done"] for reply in replies) - min(reply["begun"] for reply in replies)
        run.result.samples.append([took / turns])
        run.result.stalls.append([reply["slept"] for reply in replies])
        return sum(reply["cpu_seconds"] for reply in replies), warm + turns

    def _end(self, run: _Running) -> None:
        # Values once more, after the timed parts: what was timed still works.
        checked = run.team.call("verify", name=run.job, turns=run.result.case.lag + 2)
        run.result.checked_bytes += sum(reply["checked_bytes"] for reply in checked)
        run.result.facts = [reply["facts"] for reply in run.team.call("shut", name=run.job)]
