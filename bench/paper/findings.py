"""The paper's claims beside what was seen, and what was not better."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf
from statistics import median

import numpy as np

from bench.delay_report import modelled, over_model, undelayed
from bench.paper.dlrm import NONE
from bench.paper.effort import EXPONENTIAL
from bench.paper.folder import Part
from bench.paper.goals import LAG, OURS, P99, faster, rivals, says, served, where_of
from bench.paper.served import Served
from bench.paper.synthetic import SIZE
from bench.paper.where import LAGS
from bench.results import Measurement, Results
from bench.table import times


@dataclass(frozen=True)
class Finding:
    """A paragraph. claim: the paper's (arXiv 2512.19342), or ours where it makes none."""

    title: str
    claim: str
    seen: str


def findings(parts: Mapping[str, Part]) -> list[Finding]:
    """Of the parts that are there."""
    results = Results.of_values(parts["synthetic"].values["results"]) if "synthetic" in parts else None
    models = served(parts)
    found: list[Finding] = []
    if seen := [*(_balanced(results) if results else ()), *_balanced_model(models)]:
        claim = "Balanced, homogeneous runs: no notable advantage; so: never slower."
        found.append(Finding("Where nothing is delayed", claim, " ".join(seen)))
    if results and (text := " ".join(_delayed(results))):
        claim = "Under delays across processes: better throughput, best of all where delays are masked altogether."
        found.append(Finding("Delays, all-to-all alone", claim, text))
    if "balanced" in models and models["balanced"].levels():
        claim = "The same of a whole model, end to end: over 1.8 times in the best case."
        found.append(Finding("Delays, a whole model", claim, " ".join(_delayed_model(models["balanced"]))))
        if "load 0.7" in models["balanced"].cases():
            claim = "Better latency, too, under delays."
            found.append(Finding("Latency", claim, " ".join(_latency(models["balanced"]))))
    if "skewed" in models:
        claim = "Strongly irregular table accesses: better latency and throughput."
        found.append(Finding("Irregular accesses", claim, " ".join(_skewed(models["skewed"]))))
    if part := parts.get("where"):
        claim = "(None of the paper's.) A lag hides what comes and goes, within its reach; more ranks gain more."
        found.append(Finding("Where a lag helps, and where not", claim, " ".join(_where(part))))
    if part := parts.get("exact"):
        claim = "Accuracy is fully preserved."
        found.append(Finding("Exactness", claim, _exact(part)))
    return found


def headline(parts: Mapping[str, Part]) -> str:
    """One sentence, of what is there."""
    found = []
    if part := parts.get("synthetic"):
        results = Results.of_values(part.values["results"])
        cases = [m for m in results.measurements if m.system == OURS and m.case.delay == EXPONENTIAL and m.case.lag]
        if cases:
            m = next((m for m in cases if (m.case.ranks, m.case.bytes, m.case.lag) == (4, SIZE, LAG)), cases[0])
            pairs = [
                (rivals(results, m, blocking), kind) for blocking, kind in ((True, "blocking"), (False, "non-blocking"))
            ]
            ratios = [
                f"{times(faster(some[0], m).value)} times the speed of the best {kind} peer"
                for some, kind in pairs
                if some
            ]
            found.append(f"an all-to-all under random delays ran, at lag {m.case.lag}, at " + " and ".join(ratios))
    if one := served(parts).get("balanced"):
        gains = [one.ratio(case, one.best(case, one.synchronous(case)), one.best(case, one.uncoupled(case))).value
                 for case in one.levels()]  # fmt: skip
        if gains:
            listed = ", ".join(times(gain) for gain in gains)
            found.append(f"a DLRM whose ranks are delayed by {', '.join(one.levels())} times an iteration now and then "
                         f"ran at {listed} times that of the best synchronous system")  # fmt: skip
    return f"In the run shown there: {'; '.join(found)}." if found else ""


def _balanced(results: Results) -> Iterator[str]:
    calm = [m for m in results.measurements if m.system == OURS and m.case.delay == "none"]
    ratios = [faster(peers[0], m) for m in calm if (peers := _peers(results, m))]
    if ratios:
        low, high = min(r.value for r in ratios), max(r.value for r in ratios)
        yield (f"The all-to-all alone takes the best peer {times(low)} to {times(high)} times as long as ours, over "
               f"{len(ratios)} cases: it is cheaper, which has nothing to do with the lag.")  # fmt: skip
    lags: dict[tuple[int, str], dict[int, float]] = {}
    for m in calm:
        lags.setdefault((m.case.ranks, m.case.bytes), {})[m.case.lag] = m.summary.median
    gains = [
        one[0] / min(time for lag, time in one.items() if lag) for one in lags.values() if 0 in one and len(one) > 1
    ]
    if gains:
        yield f"The lag itself: the best one is {times(min(gains))} to {times(max(gains))} times as fast as lag 0."


def _balanced_model(models: Mapping[str, Served]) -> Iterator[str]:
    for one in models.values():
        if one.name != "skewed" and (peers := one.peers(NONE)):
            peer, ours = one.best(NONE, peers), one.best(NONE, one.ours(NONE))
            yield f"DLRM, {one.name}: {says(one.ratio(NONE, peer, ours))} times ({ours} against {peer})."


def _peers(results: Results, m: Measurement) -> list[Measurement]:
    both = [*rivals(results, m, True), *rivals(results, m, False)]
    return sorted(both, key=lambda one: one.summary.median)


def _delayed(results: Results) -> Iterator[str]:
    ours = [m for m in results.measurements if m.system == OURS and m.case.delay != "none"]
    lag = max((m.case.lag for m in ours), default=0)
    for m in ours:
        if m.case.lag == lag and m.case.delay == EXPONENTIAL and (peers := rivals(results, m, True)):
            cost = undelayed(results, m.case)
            floor = median(modelled(m, inf, cost))
            yield (f"Exponential delays, {m.case.ranks} ranks, {m.case.bytes}, lag {lag}: {says(faster(peers[0], m))} "
                   f"times the throughput of the best blocking peer ({peers[0].system}), {times(over_model(m, cost))} "
                   f"times the model's time, {times(m.summary.median / floor)} times that of no synchronisation at "
                   "all.")  # fmt: skip
    gains: dict[str, list[float]] = {}
    for m in ours:
        base = next((b for b in ours if (b.case.ranks, b.case.bytes, b.case.delay, b.case.lag)
                     == (m.case.ranks, m.case.bytes, m.case.delay, 0)), None)  # fmt: skip
        if base and m.case.lag == lag:
            gains.setdefault(m.case.delay, []).append(base.summary.median / m.summary.median)
    if gains:
        listed = ", ".join(f"{plan} {times(max(found))}" for plan, found in gains.items())
        yield (f"Lag {lag} over lag 0: {listed}. Out of its reach: one rank that is slow all the "
               "time, and a straggler that returns more seldom than the lag is long.")  # fmt: skip


def _delayed_model(one: Served) -> Iterator[str]:
    for case in one.levels():
        sync, free = one.best(case, one.synchronous(case)), one.best(case, one.uncoupled(case))
        bounded = one.best(case, [name for name in one.ours(case) if 0 < one.lag(name) < inf])
        ratio, model = says(one.ratio(case, sync, free)), times(one.model_gain(case, free))
        yield (f"Mean {case} undelayed iterations: the uncoupled exchange {ratio} times the best synchronous system "
               f"({free} against {sync}; the model allows {model}), "
               f"{bounded} {says(one.ratio(case, sync, bounded))} times.")  # fmt: skip


def _latency(one: Served) -> Iterator[str]:
    for case in (case for case in one.cases() if case.startswith("load")):
        p99 = {name: float(np.median(one.latency(case, name)[:, P99])) for name in one.systems(case)}
        sync, free = (min(some, key=lambda name: p99[name]) for some in (one.synchronous(case), one.uncoupled(case)))
        load = case.removeprefix("load ")
        yield (f"At {load} of the synchronous capacity p99 is {p99[free]:.1f} ms ({free}), of the "
               f"best synchronous system {p99[sync]:.1f} ms ({sync}).")  # fmt: skip


def _skewed(one: Served) -> Iterator[str]:
    for case in (NONE, *one.levels()):
        sync = one.best(case, one.synchronous(case))
        found = ", ".join(f"{name} {says(one.ratio(case, sync, name))}" for name in one.ours(case) if one.lag(name) > 0)
        when = "Undelayed" if case == NONE else f"Under delays of {case} iterations"
        yield f"{when}, times the speed of the best synchronous system ({sync}): {found}."
    lags = [name for name in one.ours(NONE) if name.startswith("bls")]
    if len(lags) > 1:
        ratio = says(one.ratio(NONE, lags[0], one.best(NONE, lags[1:])))
        yield f"The lag alone gives {ratio} times its own lag 0: an imbalance that persists is none that it can hide."
    ranks, cores = one.part.settings["effort"]["ranks"], one.part.environment.get("cores", 0)
    if 0 < cores < ranks:
        yield (f"Here {ranks} ranks share {cores} cores: the one that all wait for has a core to itself meanwhile, and "
               f"spreading its lookups (get) can gain no more than {cores} times.")  # fmt: skip
    yield (
        "The workload is one picked to show this: lookups that outweigh the MLPs, nearly all at one rank. Of 16 tables "
        "of dim 16 with the usual MLPs an earlier run gained 1.07 times."
    )
    if better := one.better(NONE):
        sync, best = one.best(NONE, one.synchronous(NONE)), one.best(NONE, better)
        yield f"Why not just shard better? One should: {best} is {says(one.ratio(NONE, sync, best))} times as fast."


def _where(part: Part) -> Iterator[str]:
    last = LAGS.index(8)
    ranks, gain = part.values["ranks"], part.arrays["ranks"]
    yield (f"Simulated, delays with p = 0.1 of 5 times the work: lag 8 gains {times(float(gain[0, last]))} times at "
           f"{ranks[0]} ranks, {times(float(gain[-1, last]))} at {ranks[-1]:,}; no synchronisation "
           f"{times(float(gain[-1, -1]))}.")  # fmt: skip
    mean = part.arrays["mean"]
    least, some, most = (times(float(gain)) for gain in (mean[0, -1], mean[-1, last], mean[-1, -1]))
    yield (f"At 4 ranks, with delays a quarter of the work, nothing is worth much ({least}); with 50 times, lag 8 "
           f"gives {some} of the {most} there are.")  # fmt: skip
    slow = part.arrays["slow"]
    yield (f"Where one rank always works 3 times as long, lag 8 gains {times(float(slow[-1, last]))}, and no lag more "
           f"than {times(float(slow[-1].max()))}.")  # fmt: skip


def _exact(part: Part) -> str:
    runs = part.values["runs"]
    scores = {run["auc"] for run in runs if run["auc"] is not None}
    same = all(len({run[what] for run in runs}) == 1 for what in ("pooled_sha256", "logits_sha256"))
    auc = f", AUC {', '.join(f'{score:.6f}' for score in sorted(scores))}" if scores else ""
    bits = "the same bits of pooled rows and of logits" if same else "NOT the same bits"
    return f"{len(runs)} runs of one model ({part.values['about']}): {bits}{auc}."


def not_better(parts: Mapping[str, Part]) -> list[str]:
    """Every comparison that ours lost, with by how much; and what is not worth a lag."""
    found: list[str] = []
    if part := parts.get("synthetic"):
        results = Results.of_values(part.values["results"])
        for m in results.measurements:
            if m.system == OURS:
                for rival in _peers(results, m):
                    ratio = faster(rival, m)
                    if ratio.value < 1:
                        found.append(f"alltoallv, {where_of(m)}: "
                                     f"{rival.system} took {says(ratio)} of our time")  # fmt: skip
    for one in served(parts).values():
        for case in (NONE, *one.levels()):
            ours = one.best(case, one.ours(case))
            for peer in one.peers(case):
                ratio = one.ratio(case, peer, ours)
                if ratio.value < 1:
                    found.append(f"DLRM, {one.name}, delays {case}: {peer} took {says(ratio)} of the time of {ours}")
            for name in one.ours(case):
                sync = one.best(case, one.synchronous(case))
                ratio = one.ratio(case, sync, name)
                if one.lag(name) > 0 and ratio.high < 1:
                    found.append(f"DLRM, {one.name}, delays {case}: {name} ran at {says(ratio)} of the speed of {sync}")
        if alone := one.times(NONE, "1 process, 2 threads"):
            ours = one.best(NONE, one.ours(NONE))
            alone_ratio = median(alone) / median(one.times(NONE, ours))
            if alone_ratio < 1:
                found.append(f"DLRM, {one.name}: one process with 2 threads, which exchanges nothing, took "
                             f"{times(alone_ratio)} of the time of {ours}")  # fmt: skip
    return found
