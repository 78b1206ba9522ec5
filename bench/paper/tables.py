"""The tables of a report, but for those of `bench.delay_report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np

from bench.paper.dlrm import ALONE, NONE
from bench.paper.folder import Part
from bench.paper.goals import OURS, Goal, faster, rivals, says
from bench.paper.served import QUANTILES, Served
from bench.paper.where import LAGS, MEANS, SLOW, advice, checks
from bench.results import Results
from bench.table import Table, times


def of_goals(found: list[Goal]) -> Table:
    """Reached and not."""
    words = {True: "reached", False: "NOT reached", None: "not measured"}
    rows: list[Sequence[str]] = [[one.what, one.goal, one.found, words[one.reached]] for one in found]
    notes = ["In brackets: bootstrap intervals (95 %) over the repetitions. Ratios above 1: ours is faster."]
    return Table("Goals", ["<what", "<goal", "<found", "<"], rows, notes)


def intervals_of(results: Results) -> Table:
    """Time of the best peers over ours, with intervals."""
    table = Table(
        f"Time of the best peer / {OURS}, with intervals",
        ["ranks", "<bytes", "<delay", "lag", "<best blocking", "<best non-blocking, same lag"],
        notes=["Of medians, bootstrap intervals (95 %) over the repetitions."],
    )
    for m in results.measurements:
        if m.system == OURS:
            cells = []
            for blocking in (True, False):
                best = rivals(results, m, blocking)[:1]
                cells.append(f"{says(faster(best[0], m))} {best[0].system}" if best else "–")
            table.rows.append([str(m.case.ranks), m.case.bytes, m.case.delay, str(m.case.lag), *cells])
    return table


def throughput(one: Served) -> Table:
    """Of a workload: every system, undelayed and delayed."""
    levels = one.levels()
    heads = ["undelayed", *(f"delays of {level}" for level in levels)]
    table = Table(
        f"DLRM, {one.name}: ms per iteration (faster than the best synchronous system)",
        ["<", *heads, *(f"model, {level}" for level in levels)],
        notes=[
            f"{one.part.values['about']}; {one.part.settings['effort']['ranks']} ranks.",
            f"Delays: exponential, p = 0.1, means in undelayed iterations ({one.undelayed:.2f} ms, the fastest here).",
            "Model: what the max-plus model allows over lag 0, of the delays as that system slept them.",
        ],
    )
    for system in [*one.systems(), ALONE]:
        cells = [system]
        for case in (NONE, *levels):
            if found := one.times(case, system):
                best = one.best(case, one.synchronous(case))
                cells.append(f"{median(found):.2f} ({says(one.ratio(case, best, system))})")
            else:
                cells.append("–")
        cells += [
            times(one.model_gain(case, system)) if one.times(case, system) and system != ALONE else "–"
            for case in levels
        ]
        table.rows.append(cells)
    return table


def latency(one: Served) -> Table:
    """Of a workload, in an open loop."""
    loads = [case for case in one.cases() if case.startswith("load")]
    capacity = one.part.values.get("capacity", {})
    table = Table(
        f"DLRM, {one.name}, open loop: latency, ms",
        ["<load", "<system", *(f"p{q:g}" for q in QUANTILES), "model p99", "p99 / model"],
        notes=[
            (
                "From arrival to prediction, all ranks; medians of the repetitions. Arrival times (Poisson) are fixed "
                "beforehand, the same for all."
            ),
            (
                f"Load: of what the best synchronous system serves under these delays ({capacity.get('delay', '')}): "
                f"{capacity.get('batches_per_second', 0):.0f} batches a second."
            ),
            "The model: a queue of the same arrivals and sleeps, each iteration as long as the fastest undelayed one.",
        ],
    )
    place = QUANTILES.index(99)
    for case in loads:
        for system in one.systems(case):
            found = np.median(one.latency(case, system), axis=0)
            model = float(np.median(one.model_latency(case, system), axis=0)[place])
            cells = [f"{value:.1f}" for value in found]
            ratio = times(float(found[place]) / model)
            table.rows.append([case.removeprefix("load "), system, *cells, f"{model:.1f}", ratio])
    return table


def check(results: Results) -> Table:
    """The simulator next to measured runs."""
    table = Table(
        "Measured, and simulated: ms per iteration",
        ["ranks", "<delays besides 1 ms of work", "lag", "measured", "simulated", "ratio", "ratio, sleeps unknown",
         "speed / lag 0, measured"],
        notes=[("Simulated: of the delays as they were slept, and the exchange at its smallest undelayed cost; in the "
               "last column of the delays as they were drawn, which sleeping exceeds by 0.1 ms.")],
    )  # fmt: skip
    found = checks(results)
    bases = {(one.case.ranks, one.case.delay): one.measured for one in found if one.case.lag == 0}
    for one in found:
        plan = one.case.delay.partition("+")[2]
        base = bases.get((one.case.ranks, one.case.delay))
        table.rows.append([str(one.case.ranks), plan, str(one.case.lag), f"{one.measured:.3f}", f"{one.simulated:.3f}",
                           f"{one.measured / one.simulated:.3f}", f"{one.drawn:.3f}",
                           times(base / one.measured) if base else "–"])  # fmt: skip
    return table


def maps(part: Part) -> list[Table]:
    """Simulated gains as numbers."""
    ranks = part.values["ranks"]
    axes = {"mean": ("delay / work", MEANS), "slow": ("slowest rank's work / others'", SLOW), "ranks": ("ranks", ranks)}
    found = []
    for name, (head, places) in axes.items():
        table = Table(f"Simulated: speed / lag 0, by {head}", [head, *(_lag(lag) for lag in LAGS)])
        for place, row in zip(places, part.arrays[name], strict=True):
            table.rows.append([f"{place:g}", *(times(float(gain)) for gain in row)])
        found.append(table)
    found[0].notes = [
        "4 ranks, exponential delays with p = 0.1, their mean / the work between two exchanges at the left."
    ]
    found[1].notes = ["4 ranks, the same delays with a mean of 5 times the work; one rank always works longer."]
    found[2].notes = ["The same delays with a mean of 5 times the work."]
    return found


def advised(cost: float) -> Table:
    """The rule for choosing the lag, at work."""
    rows: list[Sequence[str]] = []
    for plan, gains, one in advice(cost):
        taken = "uncoupled" if one.lag is None else f"lag {one.lag}"
        rows.append([plan, *(times(gain) for gain in gains), taken])
    heads = ["<delays besides 1 ms of work", *(f"lag {lag}" for lag in (0, 1, 2, 4, 8, 16)), "uncoupled", "<advice"]
    notes = [("`python -m bench advise` says this of a job's own timings: the smallest lag that comes within 5 % of "
             "the best one that memory allows, and none where that gains less than 5 %.")]  # fmt: skip
    return Table("What each lag would give, and which to take: 4 ranks", heads, rows, notes)


def exactness(parts: Mapping[str, Part]) -> Table:
    """Digests and AUC."""
    table = Table("Exactness", ["<model", "runs", "<pooled rows", "<logits", "<AUC"],
                  notes=["SHA-256, shortened; a run each of every system, undelayed and delayed."])  # fmt: skip
    for name, part in parts.items():
        runs = part.values.get("runs" if name == "exact" else "checks", [])
        if name != "exact" and not name.startswith("dlrm-"):
            continue
        digests = [sorted({run[what][:12] for run in runs}) for what in ("pooled_sha256", "logits_sha256")]
        scores = sorted({f"{run['auc']:.6f}" for run in runs if run["auc"] is not None})
        about = part.values["about"] if name == "exact" else name.removeprefix("dlrm-")
        table.rows.append([about, str(len(runs)), *(", ".join(some) for some in digests), ", ".join(scores) or "–"])
    return table


def _lag(lag: float) -> str:
    return "uncoupled" if lag == float("inf") else f"lag {lag:g}"
