"""What was to be reached, and whether it was: computed from the parts of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import median

from bench import intervals
from bench.delay_report import lag_of, modelled, over_model, undelayed
from bench.intervals import Interval
from bench.paper.dlrm import NONE
from bench.paper.effort import EXPONENTIAL
from bench.paper.folder import Part
from bench.paper.served import QUANTILES, Served
from bench.paper.where import checks
from bench.results import Measurement, Results
from bench.systems import SYSTEMS
from bench.table import times

OURS, LAG = "bls", 8
P99 = QUANTILES.index(99)


@dataclass(frozen=True)
class Goal:
    """One line. reached: None where it was not measured."""

    what: str
    goal: str
    found: str
    reached: bool | None


def goals(parts: Mapping[str, Part]) -> list[Goal]:
    """All of them, in order."""
    found: list[Goal] = []
    if part := parts.get("synthetic"):
        found += _synthetic(Results.of_values(part.values["results"]))
    workloads = served(parts)
    if one := workloads.get("balanced"):
        found += _balanced(one)
    if one := workloads.get("skewed"):
        found += _skewed(one)
    if part := parts.get("where"):
        found.append(_simulator(Results.of_values(part.values["results"])))
    found.append(_exact(parts))
    seconds = sum(part.seconds for part in parts.values())
    whole = all(name in parts for name in ("synthetic", "dlrm-balanced", "dlrm-skewed", "where", "exact"))
    limit = "under 15 minutes with --quick"
    found.append(Goal("all parts together", limit, f"{seconds / 60:.1f} minutes", seconds < 900 if whole else None))
    return found


def served(parts: Mapping[str, Part]) -> dict[str, Served]:
    """The workloads of the model, by name."""
    return {one.name: one for name, part in parts.items() if name.startswith("dlrm-") for one in [Served(part)]}


def says(interval: Interval) -> str:
    """2.1 (1.9-2.2)."""
    return f"{times(interval.value)} ({times(interval.low)}–{times(interval.high)})"


def by_repetition(m: Measurement) -> list[float]:
    """The median of each."""
    return [median(sample) for sample in m.samples]


def faster(peer: Measurement, ours: Measurement) -> Interval:
    """Their time over ours."""
    return intervals.of_ratio(by_repetition(peer), by_repetition(ours))


def gain_of_model(m: Measurement, cost: float) -> float:
    """Time at lag 0 over that at the system's lag, by the model."""
    return median(modelled(m, 0, cost)) / median(modelled(m, lag_of(m), cost))


def rivals(results: Results, ours: Measurement, blocking: bool) -> list[Measurement]:
    """The peers in the case of `ours`, fastest first."""
    found = [m for m in results.of(ours.case).values() if not SYSTEMS[m.system].ours]
    return sorted((m for m in found if SYSTEMS[m.system].blocking is blocking), key=lambda m: m.summary.median)


def _ours(results: Results, delayed: bool) -> Iterator[Measurement]:
    for m in results.measurements:
        if m.system == OURS and (m.case.delay != "none") is delayed:
            yield m


def where_of(m: Measurement) -> str:
    """Its case, in words."""
    ranks = f"{m.case.ranks} ranks, " if m.case.ranks != 4 else ""
    return f"{ranks}{m.case.bytes}, {m.case.delay}, lag {m.case.lag}"


def _synthetic(results: Results) -> Iterator[Goal]:
    for delayed, what in ((True, "delayed"), (False, "undelayed")):
        found = [(over_model(m, undelayed(results, m.case)), m) for m in _ours(results, delayed)]
        if found:
            worst, m = max(found, key=lambda one: one[0])
            above = sum(ratio > 1.10 for ratio, _ in found)
            text = f"at most {times(worst)} ({where_of(m)}); {len(found) - above} of {len(found)} cases"
            yield Goal(f"alltoallv, {what}: measured / model, every pattern, size and lag", "≤ 1.10", text, above == 0)
    lag = max((m.case.lag for m in _ours(results, True)), default=0)
    lag = LAG if any(m.case.lag == LAG for m in _ours(results, True)) else lag
    ours = [m for m in _ours(results, True) if m.case.lag == lag]
    exponential = [m for m in ours if m.case.delay == EXPONENTIAL]
    for blocking, wanted in ((True, 1.8), (False, 1.1)):
        kind = "blocking" if blocking else f"non-blocking, lag {lag}"
        for m in exponential:
            if peers := rivals(results, m, blocking):
                ratio = faster(peers[0], m)
                model = f"; the model allows {times(gain_of_model(m, undelayed(results, m.case)))}" if blocking else ""
                text = f"{says(ratio)} {peers[0].system}{model}"
                yield Goal(f"alltoallv, exponential delays, {m.case.bytes}, {m.case.ranks} ranks, lag {lag}: best peer "
                           f"({kind}) / ours", f"≥ {wanted}", text, ratio.value >= wanted)  # fmt: skip
    others = [
        (faster(peers[0], m).value / gain_of_model(m, undelayed(results, m.case)), m)
        for m in ours if m.case.delay != EXPONENTIAL and (peers := rivals(results, m, True))
    ]  # fmt: skip
    if others:
        worst, m = min(others, key=lambda one: one[0])
        yield Goal(f"the same under other delays, lag {lag}, blocking: of the model's ratio", "≥ 0.9",
                   f"at least {times(worst)} ({where_of(m)})", worst >= 0.9)  # fmt: skip


def _balanced(one: Served) -> Iterator[Goal]:
    for case in one.levels():
        sync, free = one.best(case, one.synchronous(case)), one.best(case, one.uncoupled(case))
        ratio, model = one.ratio(case, sync, free), one.model_gain(case, free)
        text = f"{times(ratio.value / model)}: {says(ratio)} times ({free} against {sync}), the model's {times(model)}"
        what = (
            f"DLRM, exponential delays of {case} undelayed iterations: the uncoupled exchange's gain over the best "
            "synchronous system / the model's gain"
        )
        yield Goal(what, "≥ 0.87", text, ratio.value / model >= 0.87)
    if "load 0.7" in one.cases():
        found = []
        for system in one.uncoupled("load 0.7"):
            ratios = one.latency("load 0.7", system)[:, P99] / one.model_latency("load 0.7", system)[:, P99]
            found.append((intervals.of_median(ratios.tolist()), system))
        ratio, system = min(found, key=lambda pair: pair[0].value)
        ms, model = (
            median(a[:, P99]) for a in (one.latency("load 0.7", system), one.model_latency("load 0.7", system))
        )
        yield Goal("DLRM, open loop at 70 % of the synchronous capacity: p99 / the model's", "≤ 1.15",
                   f"{says(ratio)}: {ms:.1f} ms, the model {model:.1f} ms ({system})", ratio.value <= 1.15)  # fmt: skip
    if peers := one.peers(NONE):
        peer, ours = one.best(NONE, peers), one.best(NONE, one.ours(NONE))
        ratio = one.ratio(NONE, peer, ours)
        yield Goal("DLRM balanced, no delays: time of the best peer / ours", "≥ 1.0",
                   f"{says(ratio)} ({ours} against {peer})", ratio.value >= 1.0)  # fmt: skip


def _skewed(one: Served) -> Iterator[Goal]:
    sync, free = one.best(NONE, one.synchronous(NONE)), one.best(NONE, one.uncoupled(NONE))
    ratio, text = one.ratio(NONE, sync, free), ""
    if peers := [name for name in one.peers(NONE) if one.lag(name) == 0]:
        peer = one.best(NONE, peers)
        text = f"; {says(one.ratio(NONE, peer, free))} against {peer}"
    yield Goal("DLRM irregular (zipf, worst placement), no delays: the uncoupled exchange against the best synchronous "
               "system", "≥ 1.5", f"{says(ratio)} ({free} against {sync}){text}", ratio.value >= 1.5)  # fmt: skip


def _simulator(results: Results) -> Goal:
    found = checks(results)
    far = max(found, key=lambda check: abs(check.measured / check.simulated - 1))
    off = abs(far.measured / far.simulated - 1)
    text = f"at most {off:.1%} off ({far.case.ranks} ranks, {far.case.delay}, lag {far.case.lag})"
    return Goal(f"the simulator against {len(found)} measured runs", "within 10 %", text, off <= 0.10)


def _exact(parts: Mapping[str, Part]) -> Goal:
    groups = [part.values["runs" if name == "exact" else "checks"] for name, part in parts.items()
              if name == "exact" or name.startswith("dlrm-")]  # fmt: skip
    same = all(
        len({run[what] for run in group}) == 1 for group in groups for what in ("pooled_sha256", "logits_sha256")
    )
    runs = sum(map(len, groups))
    text = f"{'equal' if same else 'NOT EQUAL'} in all {runs} runs, of {len(groups)} models"
    return Goal("digests of pooled rows, and of logits", "equal", text, same if runs else None)
