"""A whole model over ranks: every workload undelayed and under delays, in every system, closed loop and open loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import count
from math import inf
from statistics import median
from typing import Any

import numpy as np

from bench import environment
from bench.launchers import Interpreters, Unavailable, plan
from bench.paper.blocks import Again
from bench.paper.effort import MAIN_LOAD, Dlrm
from bench.paper.folder import Arrays
from bench.paper.workloads import Workload
from bench.team import Team, TeamFailed

NONE, ALONE = "none", "1 process, 2 threads"
TORCHREC = "gloo"  # the runtime that it runs on
_RANK = "bench.paper.dlrm_rank"
_RANKS = {TORCHREC: "bench.paper.torchrec_rank"}
_CHECKED_BATCHES = 4


@dataclass(frozen=True)
class System:
    """Who brings the pooled vectors to their samples."""

    name: str
    runtime: str
    lag: float  # of the model: what couples the ranks' loops; infinity: nothing
    changes: dict[str, Any] = field(default_factory=dict)  # of the run's options
    ours: bool = False
    model: str = "model"  # which of the workload's models: "sharded" has the better placement

    @property
    def digests(self) -> bool:
        """Whether its bits are to be ours: TorchRec pools by another kernel, and is compared within a tolerance."""
        return self.runtime != TORCHREC

    @property
    def synchronous(self) -> bool:
        return self.lag == 0


def systems(workload: Workload, lags: list[int]) -> list[System]:
    """Those that are measured for a workload, in the order of the tables."""
    found = [
        System("gloo, lag 0", "bls", 0, {"dist_backend": "gloo", "lag": 0}),
        System("Open MPI, lag 0", "openmpi-dlrm", 0, {"dist_backend": "mpi", "lag": 0}),
        System("TorchRec on gloo", TORCHREC, 0),
        System(f"Open MPI, lag {lags[-1]}", "openmpi-dlrm", lags[-1], {"dist_backend": "mpi", "lag": lags[-1]}),
        *(System(f"bls, lag {lag}", "bls", lag, {"lag": lag}, ours=True) for lag in lags),
        System("put", "bls", inf, {"exchange": "put", "lag": 1}, ours=True),
        System("get", "bls", inf, {"exchange": "get", "lag": 1}, ours=True),
    ]
    if workload.better:
        found += [
            System("gloo, lag 0, sharded better", "bls", 0, {"dist_backend": "gloo", "lag": 0}, model="sharded"),
            System("Open MPI, lag 0, sharded better", "openmpi-dlrm", 0, {"dist_backend": "mpi", "lag": 0},
                   model="sharded"),
            System("bls, lag 0, sharded better", "bls", 0, {"lag": 0}, ours=True, model="sharded"),
            System("put, sharded better", "bls", inf, {"exchange": "put", "lag": 1}, ours=True, model="sharded"),
        ]  # fmt: skip
    return found


class Teams:
    """The runtimes' ranks; the same for all workloads."""

    def __init__(self, ranks: int, interpreters: Interpreters) -> None:
        self.ranks = ranks
        self.skipped: dict[str, str] = {}
        self._teams: dict[str, Team] = {}
        self._names = count()
        starting = {}
        for runtime in ("bls", "openmpi-dlrm", TORCHREC):
            if runtime == TORCHREC and not find_spec("torchrec"):
                self.skipped["TorchRec"] = "not installed: bash ci/torch-suites"
                continue
            try:
                starting[runtime] = Team(runtime, ranks, plan(runtime, ranks, environment.cores(), interpreters))
            except Unavailable as reason:
                self.skipped[runtime] = str(reason)
        for runtime, team in starting.items():
            try:
                team.ready()
                self._teams[runtime] = team
            except TeamFailed as reason:
                self.skipped[runtime] = str(reason)
        if "bls" not in self._teams:
            self.close()
            raise TeamFailed(self.skipped["bls"])

    def __enter__(self) -> Teams:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End all ranks."""
        for team in self._teams.values():
            team.close()
        self._teams = {}

    def has(self, runtime: str) -> bool:
        return runtime in self._teams

    def call(self, runtime: str, function: str, **arguments: Any) -> list[dict[str, Any]]:
        """Raises TeamFailed, after which the runtime is gone."""
        try:
            return self._teams[runtime].call("run", function=function, **arguments)
        except TeamFailed as reason:
            del self._teams[runtime]
            self.skipped[runtime] = str(reason)
            raise

    def load(self, model: str, flags: list[str]) -> None:
        """On all ranks of all runtimes."""
        for runtime in list(self._teams):
            function = f"{_RANKS.get(runtime, _RANK)}:load"
            with self.peers_may_fail(runtime):
                self.call(runtime, function, name=model, flags=flags, alone=False, limit=300.0)

    @contextmanager
    def peers_may_fail(self, runtime: str) -> Iterator[None]:
        """Without them the rest goes on; `skipped` says why they are missing."""
        try:
            yield
        except TeamFailed:
            if runtime == "bls":
                raise

    def serve(self, system: System, workload: str, changes: dict[str, Any]) -> list[dict[str, Any]]:
        """One run."""
        replies = self.call(
            system.runtime, f"{_RANKS.get(system.runtime, _RANK)}:serve", name=f"{workload}/{system.model}",
            job=f"paper-{next(self._names)}", changes={**system.changes, **changes},
        )  # fmt: skip
        if system.runtime == TORCHREC:
            from bench.paper.torchrec_rank import together

            return together(replies)
        return replies

    def alone(self, workload: str, threads: int, digest: bool = False) -> list[dict[str, Any]]:
        """One process with the whole model: no exchange at all."""
        return self.call("bls", f"{_RANK}:alone", name=f"{workload}/alone", job=f"paper-{next(self._names)}",
                         threads=threads, digest=digest)  # fmt: skip


class Measuring:
    """One workload."""

    def __init__(
        self, workload: Workload, effort: Dlrm, teams: Teams, step: Callable[[str], object] = lambda _: None
    ) -> None:
        self.workload, self.effort, self.teams, self.step = workload, effort, teams, step
        self.systems = [one for one in systems(workload, effort.lags) if teams.has(one.runtime)]
        self.again = Again(effort.again)
        self.values: dict[str, Any] = {"runs": [], "checks": [], "workload": workload.name, "about": workload.about}
        self.arrays: Arrays = {}

    def measure(self) -> None:
        """Everything: checks, undelayed, delayed, and in an open loop."""
        effort, name = self.effort, self.workload.name
        flags = [*self.workload.flags, "--num-batches", str(effort.batches)]
        self.teams.load(f"{name}/model", flags)
        if self.workload.better:
            self.teams.load(f"{name}/sharded", [*flags, *self.workload.better])
        self.teams.call("bls", f"{_RANK}:load", name=f"{name}/alone", flags=flags, alone=True, limit=300.0)
        self._check()
        for repetition in range(effort.repeat if self.workload.first else effort.more_repeat):
            for system in self._order(repetition):
                self._run(NONE, system, repetition, {})
            self._alone(repetition)
        undelayed = min(self._ms(NONE).values())
        self.values["undelayed_ms"] = undelayed
        for level in effort.delays if self.workload.first else effort.more_delays:
            delay = f"exp:p=0.1,mean={undelayed * level * 1e3:.0f}us"
            for repetition in range(effort.delayed_repeat):
                changes = {"delay": delay, "delay_seed": repetition, "num_batches": effort.delayed_batches}
                for system in self._order(repetition):
                    self._run(f"{level:g}", system, repetition, changes)
        if self.workload.first:
            self._open(f"exp:p=0.1,mean={undelayed * 5 * 1e3:.0f}us")
        self.values["again"] = self.again.found

    def _order(self, repetition: int) -> Iterator[System]:
        for k in range(len(self.systems)):
            yield self.systems[(k + repetition) % len(self.systems)]

    def _check(self) -> None:
        """Digests of the first batches, undelayed and delayed."""
        for system in (one for one in self.systems if one.digests):
            for delay in (NONE, "exp:p=0.3,mean=1ms"):
                changes = {"digest": True, "num_batches": _CHECKED_BATCHES, "delay": delay}
                if not self.teams.has(system.runtime):
                    continue
                reply = self.teams.serve(system, self.workload.name, changes)[0]
                self.values["checks"].append({
                    "system": system.name, "delay": delay, "auc": reply["auc"],
                    **{key: reply[key] for key in ("pooled_sha256", "logits_sha256")},
                })  # fmt: skip

    def _run(self, case: str, system: System, repetition: int, changes: dict[str, Any]) -> None:
        if self.teams.has(system.runtime):
            with self.teams.peers_may_fail(system.runtime):
                self._measured(case, system, repetition, changes)

    def _measured(self, case: str, system: System, repetition: int, changes: dict[str, Any]) -> None:
        replies, noise = self.again.measured(lambda: self.teams.serve(system, self.workload.name, changes))
        reply, number = replies[0], len(self.values["runs"])
        run = {"case": case, "system": system.name, "repetition": repetition, "ms": reply["ms"], **noise}
        run["lag"] = None if system.lag == inf else system.lag
        run["samples"], run["bytes_by_path"] = reply["samples"], reply["bytes_by_path"]
        self.values["runs"].append(run)
        self.arrays[f"{number}/latency"] = np.array(reply["latency"], np.int64)
        if changes.get("delay", NONE) != NONE:
            self.arrays[f"{number}/slept"] = np.array(reply["slept"], np.int64)
        if "arrival_rate" in changes:
            self.arrays[f"{number}/arrived"] = np.array(reply["arrived"], np.int64)
        self.step(f"{case}, {system.name}")

    def _alone(self, repetition: int) -> None:
        replies, noise = self.again.measured(lambda: self.teams.alone(self.workload.name, 2))
        run = {"case": NONE, "system": ALONE, "repetition": repetition, **noise, "lag": None}
        self.values["runs"].append({**run, "ms": replies[0]["ms"], "samples": replies[0]["samples"]})
        self.step("1 process")

    def _ms(self, case: str, only: Callable[[System], bool] = lambda _: True) -> dict[str, float]:
        """Medians by system."""
        times = {
            one.name: [run["ms"] for run in self.values["runs"] if (run["case"], run["system"]) == (case, one.name)]
            for one in self.systems if only(one)
        }  # fmt: skip
        return {name: median(found) for name, found in times.items() if found}

    def _open(self, delay: str) -> None:
        """Latencies at shares of what the best synchronous system serves under these delays, with the same arrivals."""
        seed = 100
        base = {"delay": delay, "delay_seed": seed, "num_batches": self.effort.open_batches}
        for repetition in range(2):
            for system in self._order(repetition):
                if system.synchronous and system.model == "model" and system.runtime != TORCHREC:
                    self._run("capacity", system, repetition, base)
        capacity = 1e3 / min(self._ms("capacity").values())
        self.values["capacity"] = {"batches_per_second": capacity, "delay": delay}
        for repetition in range(2 * self.effort.open_repeat):
            for load in self.effort.loads:
                if repetition >= self.effort.open_repeat and load != MAIN_LOAD:
                    continue
                changes = {**base, "arrival_rate": load * capacity, "delay_seed": seed + repetition}
                for system in self._order(repetition):
                    if system.ours or (system.synchronous and system.runtime != TORCHREC):
                        self._run(f"load {load:g}", system, repetition, changes)
