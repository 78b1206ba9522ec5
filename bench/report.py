"""The tables of `python -m bench alltoallv`, from its results."""

from __future__ import annotations

from statistics import median
from typing import Any

from bench.cases import Case, average_bytes, bytes_label
from bench.environment import disturbed, last_level_cache
from bench.results import Measurement, Results
from bench.summary import best_peer
from bench.systems import SYSTEMS
from bench.table import Table, microseconds, times
from blsrdma.settings import format_size


def tables(results: Results) -> list[Table]:
    """Everything there is to say, in the order to say it."""
    kinds = dict.fromkeys((case.self_message, case.read) for case in results.cases())
    found = [table for kind in kinds for table in (_times(results, *kind), _ratios(results, *kind))]
    if lags := _lags(results):
        found.append(lags)
    return found


def about(results: Results) -> list[str]:
    """Where and when, in sentences."""
    e = results.environment
    others = [others for m in results.measurements for others in m.others]
    lines = [
        *disturbed(median(others) if others else e["busy_before"]),
        f"{e['date']}, commit {e['commit']}, Python {e['python']}, Linux {e['kernel']}",
        f"{e['cpu']}, {e['cores']} cores; {e['caches']}; {format_size(e['memory_bytes'])} of memory",
        f"load average {e['load_before']} before, {e.get('load_after', '?')} after (our own ranks included)",
    ]
    if others:
        lines.append(f"cores that other processes kept busy: median {median(others):.2f}, at most {max(others):.2f}")
    for runtime, versions in results.versions.items():
        lines.append(f"{runtime}: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    lines += [f"started with {' '.join(given)} ({which})" for which, given in results.launch.items() if given]
    if paths := sorted({path for m in results.measurements for fact in m.facts for path in fact.get("paths", [])}):
        lines.append(f"blsrdma's bytes went: {', '.join(paths)}")
    checked = sum(m.checked_bytes for m in results.measurements)
    lines.append(
        f"{format_size(checked)} of messages were compared with what was sent, before and after the timed parts"
    )
    lines += [f"left out: {what}: {reason.splitlines()[0]}" for what, reason in results.skipped.items()]
    return lines


def _times(results: Results, self_message: str, read: bool) -> Table:
    everyone = results.systems()
    own = {
        "view": "nobody copies the message to oneself (peers send themselves nothing)",
        "copy": "everybody copies the message to oneself too",
    }[self_message]
    table = Table(
        f"alltoallv, µs per iteration; {own}" + ("; every rank reads every byte it gets" if read else ""),
        [*_CASE, *everyone],
        notes=["Medians of the chunks of all repetitions ± half the interquartile range."],
    )
    for case in _of_kind(results, self_message, read):
        found = results.of(case)
        table.rows.append([*_case(case), *(_cell(found.get(name)) for name in everyone)])
    if blocking := [name for name in everyone if SYSTEMS[name].blocking]:
        table.notes.append(f"{', '.join(blocking)}: blocking, so as at lag 0 in every row; peers there all the same.")
    return table


def _ratios(results: Results, self_message: str, read: bool) -> Table:
    ours = [name for name in results.systems() if SYSTEMS[name].ours and not SYSTEMS[name].diagnostic]
    table = Table(
        f"Time of the best peer / ours (message to oneself: {self_message}{', read' if read else ''})",
        [*_CASE, *(f"<{name}" for name in ours)],
        notes=["Of the medians [range over the repetitions], and which peer is the best; above 1 ours is faster."],
    )
    for case in _of_kind(results, self_message, read):
        table.rows.append([*_case(case), *(_ratio(results.of(case), name) for name in ours)])
    return table


_CASE = ["ranks", "<bytes per peer", "lag"]


def _case(case: Case) -> list[str]:
    return [str(case.ranks), bytes_label(case.bytes), str(case.lag)]


def _of_kind(results: Results, self_message: str, read: bool) -> list[Case]:
    return [case for case in results.cases() if (case.self_message, case.read) == (self_message, read)]


def _cell(measurement: Measurement | None) -> str:
    if measurement is None:
        return "–"
    summary = measurement.summary
    return f"{microseconds(summary.median)} ±{summary.spread:.0%}"


def _ratio(found: dict[str, Measurement], name: str) -> str:
    if name not in found:
        return "–"
    peers: dict[str, Any] = {peer: m.samples for peer, m in found.items() if not SYSTEMS[peer].ours}
    best = best_peer(peers, found[name].samples)
    if best is None:
        return "–"
    return f"{times(best.value)} [{times(best.low)}–{times(best.high)}] {best.peer}"


def _lags(results: Results) -> Table | None:
    """What a lag costs where nothing is delayed."""
    table = Table(
        "A lag without delays, bls: time at lag 0 / time at the lag (1: it costs nothing)",
        [*_CASE, "<self", "ratio", "windows of all ranks", "bytes of an iteration"],
        notes=[f"The last-level cache has {format_size(last_level_cache())}."],
    )
    for case in results.cases():
        base = Case(case.ranks, case.bytes, 0, case.self_message, case.read)
        m, before = results.of(case).get("bls"), results.of(base).get("bls")
        if m is None or before is None or case.lag == 0:
            continue
        memory = sum(fact["memory_bytes"] for fact in m.facts)
        stored = int(average_bytes(case)) * case.ranks * (case.ranks - 1)
        gain = times(before.summary.median / m.summary.median)
        table.rows.append([*_case(case), case.self_message, gain, format_size(memory), format_size(stored)])
    return table if table.rows else None
