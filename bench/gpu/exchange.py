"""The part of `python -m bench gpu` about exchanges between ranks: with and without MPS."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

from bench.gpu import mps
from bench.gpu.effort import Effort
from bench.gpu.teams import team, words
from bench.launchers import Unavailable
from bench.team import Team, TeamFailed

_RANK = "bench.gpu.exchange_rank"
_NAMES = count()
PEERS = {"gloo": "bls", "mpi": "mpich"}  # name -> the ranks it runs in: gloo in ours
NCCL_SECONDS = 40.0  # to refuse, or to begin


def measure(effort: Effort, report: Callable[[str], None], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Every size, number of ranks and system, without MPS and then with it. `keep` gets what there is on the way."""
    found: dict[str, Any] = {"runs": [], "skipped": {}, "mps": {}}
    failure: TeamFailed | None = None
    found["nccl"] = nccl(effort)
    for served in (False, True):
        try:
            with _mps(served) as environment:
                for ranks in effort.ranks:
                    _ranks(effort, found, ranks, served, environment, report)
                    keep(found)
                found["mps"]["used" if served else "without"] = mps.log(environment) if served else ""
        except mps.NoMps as reason:
            found["skipped"]["MPS"] = str(reason)
            report(f"without MPS only: {reason}")
        except TeamFailed as error:
            failure = error
            found["skipped"][f"{'with' if served else 'without'} MPS"] = words(error)
            keep(found)
            report(str(error))
    if failure is not None:
        raise failure
    return found


@contextmanager
def _mps(served: bool) -> Iterator[dict[str, str]]:
    if not served:
        yield {}
        return
    with mps.served() as environment:
        yield environment


def nccl(effort: Effort) -> dict[str, Any]:
    """Whether NCCL exchanges between two ranks here; else its own words."""
    try:
        ranks = team(2)
        try:
            ranks.ready()
            ranks.call("run", function=f"{_RANK}:load", prepare=effort.prepare)
            ranks.call("run", function=f"{_RANK}:prepare", system="nccl", size=effort.sizes[0], name="nccl",
                       seconds=0.01, limit=NCCL_SECONDS)  # fmt: skip
        finally:
            ranks.close()
    except TeamFailed as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        said = [line for line in lines if "NCCL" in line or "nccl" in line or "Duplicate" in line or "Error:" in line]
        return {"works": False, "why": next((line for line in said if "Duplicate" in line), (said or lines)[-1])[:300]}
    return {"works": True, "why": ""}


def _ranks(
    effort: Effort, found: dict[str, Any], ranks: int, served: bool, environment: dict[str, str],
    report: Callable[[str], None],
) -> None:  # fmt: skip
    """All sizes with so many ranks."""
    with ExitStack() as stack:
        teams: dict[str, Team] = {}
        for runtime in dict.fromkeys(["bls", *PEERS.values()]):
            try:
                each = team(ranks, runtime, environment)
            except Unavailable as reason:
                found["skipped"][runtime] = str(reason)
                continue
            stack.callback(each.close)
            teams[runtime] = each
        for runtime, each in list(teams.items()):
            try:
                each.ready()
                facts = each.call("run", function=f"{_RANK}:load", prepare=effort.prepare)
            except TeamFailed as error:
                if runtime == "bls":
                    raise
                found["skipped"][runtime] = words(error)
                del teams[runtime]
                continue
            found.setdefault("device", facts[0])
            found.setdefault("versions", {})[runtime] = each.versions
        staged = [why for reply in teams["bls"].call("run", function=f"{_RANK}:reach", name=f"gpu-{next(_NAMES)}")
                  for why in reply["staged"]]  # fmt: skip
        if staged:
            found["skipped"]["ipc"] = staged[0]
        copies = teams["bls"].call("run", function=f"{_RANK}:copies", size=effort.copy_bytes, repeat=effort.repeat)
        for size in effort.sizes:
            run = _size(effort, teams, size, found, ["staged"] if staged else ["ipc", "staged"])
            found["runs"].append({"ranks": ranks, "mps": served, "bytes": size, "copy_gbs": copies[0]["gbs"], **run})
            report(f"exchange: {ranks} ranks, {size >> 10} KiB, {'with' if served else 'without'} MPS: measured")


def _size(
    effort: Effort, teams: dict[str, Team], size: int, found: dict[str, Any], paths: Sequence[str]
) -> dict[str, Any]:
    """One size: ms of every system in every round."""
    systems = {f"{path} {lag}": "bls" for path in paths for lag in effort.lags}
    systems |= {name: runtime for name, runtime in PEERS.items() if runtime in teams}
    if found["nccl"]["works"]:
        systems["nccl"] = "bls"
    turns, facts, checked = {}, {}, 0
    for system, runtime in list(systems.items()):
        try:
            replies = teams[runtime].call(
                "run", function=f"{_RANK}:prepare", system=system, size=size, name=f"gpu-{next(_NAMES)}",
                seconds=effort.block_seconds, limit=effort.limit,
            )  # fmt: skip
        except TeamFailed as error:
            if runtime == "bls":
                raise
            found["skipped"][system] = words(error)
            del teams[runtime], systems[system]
            continue
        turns[system] = min(reply["turns"] for reply in replies)
        facts[system] = replies[0]["facts"]
        checked += sum(reply["checked"] for reply in replies)
    samples: dict[str, list[float]] = {system: [] for system in systems}
    order = list(systems)
    for repetition in range(effort.repeat):
        for k in range(len(order)):
            system = order[(k + repetition) % len(order)]
            replies = teams[systems[system]].call(
                "run", function=f"{_RANK}:block", system=system, turns=turns[system], limit=effort.limit
            )
            samples[system].append(max(reply["ms"] for reply in replies))
    for runtime in set(systems.values()):
        checked += sum(reply["checked"] for reply in teams[runtime].call("run", function=f"{_RANK}:end"))
    return {"ms": samples, "facts": facts, "checked": checked}
