"""Ranks on a line: what the controller does when one fails."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from bench.launchers import Interpreters, Launch, Unavailable, plan
from bench.systems import DEFAULT, MODULES, SYSTEMS
from bench.team import Team, TeamFailed

# A rank without any library: it obeys `run` commands of this file.
RANK = """
import os, sys
import bench.rank as rank, bench.systems as systems
from bench.systems.base import Runtime
import types
module = types.ModuleType("bench.systems.nothing")
class Nothing(Runtime):
    def __init__(self, name):
        super().__init__(name)
        self.rank, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    def join(self, hellos): return {"nothing": str(len(hellos))}
    def open(self, job): raise NotImplementedError
Nothing.__module__ = module.__name__
module.Nothing = Nothing
sys.modules[module.__name__] = module
systems.MODULES["nothing"] = "nothing"
sys.argv = ["rank", "nothing"]
rank.main()
"""


def team(ranks: int) -> Team:
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    return Team("nothing", ranks, Launch([sys.executable, "-c", RANK], True, {"PYTHONPATH": path}))


def chatty(runtime, progress, times):  # type: ignore[no-untyped-def]
    for i in range(times):
        progress(i)
    return {"rank": runtime.rank}


def raising(runtime, progress, rank):  # type: ignore[no-untyped-def]
    if runtime.rank == rank:
        raise RuntimeError("on purpose")
    return {}


def hanging(runtime, progress, rank):  # type: ignore[no-untyped-def]
    import time

    if runtime.rank == rank:
        time.sleep(60)
    return {}


def dying(runtime, progress):  # type: ignore[no-untyped-def]
    os._exit(3)


def test_replies_come_in_rank_order_and_progress_on_the_way() -> None:
    ranks = team(3)
    ranks.ready()
    assert ranks.versions == {"nothing": "3"}
    seen: list[tuple[int, int]] = []
    replies = ranks.call(
        "run", function="tests.bench.test_team:chatty", times=100, progress=lambda rank, n: seen.append((rank, n))
    )
    assert [reply["rank"] for reply in replies] == [0, 1, 2]
    assert sorted(seen) == [(rank, n) for rank in range(3) for n in range(100)]
    ranks.close()


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        ("raising", {"rank": 1}, "rank 1: RuntimeError: on purpose"),
        ("hanging", {"rank": 0}, "hanging"),  # its stack names the function
        ("dying", {}, "ended without a word"),
    ],
)
def test_a_failing_rank_fails_the_team_and_says_why(function: str, arguments: dict[str, int], said: str) -> None:
    ranks = team(2)
    ranks.ready()
    pids = [process.pid for process in ranks._processes]
    with pytest.raises(TeamFailed, match=said):
        ranks.call("run", function=f"tests.bench.test_team:{function}", limit=2, **arguments)
    ranks.close()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_a_rank_that_cannot_start_shows_its_output() -> None:
    ranks = Team("nothing", 2, Launch([sys.executable, "-c", "import no_such_module"], True, {}))
    with pytest.raises(TeamFailed, match="no_such_module"):
        ranks.ready()


def test_every_system_has_a_module() -> None:
    models = {"openmpi-dlrm"}  # serve models, and are no system of the all-to-all
    assert {kind.runtime for kind in SYSTEMS.values()} | models == set(MODULES)
    assert set(DEFAULT) <= set(SYSTEMS)


def test_a_missing_mpi_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_MPICH_PYTHON", "/no/such/python")
    with pytest.raises(Unavailable, match="python -m bench peers"):
        plan("mpich", 2, 2, Interpreters())
