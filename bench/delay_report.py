"""The tables of `python -m bench delays`: next to the max-plus model, and next to the peers."""

from __future__ import annotations

from math import inf
from statistics import median

from bench.cases import Case, bytes_label
from bench.results import Measurement, Results
from bench.simulate import per_iteration
from bench.systems import SYSTEMS
from bench.table import Table, times

OURS = "bls"


def tables(results: Results) -> list[Table]:
    """Two for each number of ranks and size."""
    kinds = dict.fromkeys((case.ranks, case.bytes) for case in results.cases())
    return [table for kind in kinds for table in (_models(results, *kind), _peers(results, *kind))]


def undelayed(results: Results, case: Case) -> float:
    """c of the model, in ns: the smallest undelayed time per iteration of any system at any lag."""
    return min(
        m.summary.median for m in results.measurements
        if m.case.delay == "none" and (m.case.ranks, m.case.bytes) == (case.ranks, case.bytes)
    )  # fmt: skip


def lag_of(m: Measurement) -> int:
    """That the system's loop allows."""
    return 0 if SYSTEMS[m.system].blocking else m.case.lag


def modelled(m: Measurement, lag: float, cost: float) -> list[float]:
    """ns per iteration, by repetition, of the delays as they were slept. cost: ns."""
    if not m.stalls:  # undelayed
        return [cost] * len(m.samples)
    return [float(per_iteration(m.slept(repetition), [lag], cost)[0]) for repetition in range(len(m.samples))]


def over_model(m: Measurement, cost: float) -> float:
    """Measured / model at the lag that the system has: the median over repetitions, or chunks, as c is."""
    if not m.stalls:
        return m.summary.median / cost
    pairs = zip(m.samples, modelled(m, lag_of(m), cost), strict=True)
    return median(median(sample) / model for sample, model in pairs)


def _models(results: Results, ranks: int, size: str) -> Table:
    systems = results.systems()
    table = Table(
        f"{ranks} ranks, {bytes_label(size)} to each peer: ms per iteration (measured / model)",
        ["<delay", "lag", "model", "no synchronisation", *systems],
        notes=[
            f"Medians of the repetitions. The model is max-plus at the row's lag, of the delays as {OURS} slept them.",
            "Each system is compared with the model of the delays as it slept them itself.",
        ],
    )
    if blocking := [name for name in systems if SYSTEMS[name].blocking]:
        table.notes.append(f"{', '.join(blocking)}: blocking, so compared with the model at lag 0.")
    for case in results.cases():
        if (case.ranks, case.bytes) != (ranks, size):
            continue
        found, cost = results.of(case), undelayed(results, case)
        which = found.get(OURS) or next(iter(found.values()))
        models = [median(modelled(which, lag, cost)) for lag in (case.lag, inf)]
        cells = [
            f"{m.summary.median / 1e6:.3f} ({times(over_model(m, cost))})" if (m := found.get(name)) else "–"
            for name in systems
        ]
        table.rows.append([case.delay, str(case.lag), *(f"{model / 1e6:.3f}" for model in models), *cells])
        note = f"c = {cost / 1e6:.4f} ms: the smallest undelayed time of any system here, at any lag."
        if note not in table.notes:
            table.notes.append(note)
    return table


def _peers(results: Results, ranks: int, size: str) -> Table:
    table = Table(
        f"{ranks} ranks, {bytes_label(size)} to each peer: time of the best peer / {OURS}",
        ["<delay", "lag", "<best blocking", "model: lag 0 / lag", "<best non-blocking, same lag"],
        notes=["Of the medians; above 1 ours is faster. The model's ratio is what the lag itself can give."],
    )
    for case in results.cases():
        found = results.of(case)
        if (case.ranks, case.bytes) != (ranks, size) or OURS not in found:
            continue
        ours, cost = found[OURS], undelayed(results, case)
        gain = median(modelled(ours, 0, cost)) / median(modelled(ours, case.lag, cost))
        peers = [m for m in found.values() if not SYSTEMS[m.system].ours]
        cells = [_best([m for m in peers if SYSTEMS[m.system].blocking is kind], ours) for kind in (True, False)]
        table.rows.append([case.delay, str(case.lag), cells[0], times(gain), cells[1]])
    return table


def _best(peers: list[Measurement], ours: Measurement) -> str:
    if not peers:
        return "–"
    best = min(peers, key=lambda m: m.summary.median)
    return f"{times(best.summary.median / ours.summary.median)} {best.system}"
