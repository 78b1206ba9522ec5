"""The tables of `python -m bench gpu`, out of what its parts left. Pure: nothing here needs a GPU."""

from __future__ import annotations

from statistics import median
from typing import Any

from bench.intervals import of_ratio
from bench.summary import summarise
from bench.table import Table, microseconds, times
from blsrdma.lag import max_plus
from blsrdma.settings import format_size

LOOKUP_SHARE, LOOKUP_FBGEMM = 0.8, 1.0  # what is to be reached
EXCHANGE_SHARE, EXCHANGE_GLOO = 0.6, 5.0
LARGEST = 16 << 20  # bytes to each pair, of the goals of exchanges
DLRM_OVER = 1.1
DELAYED = 1.15  # of the model: as on the CPU

OURS = ("ipc", "staged")  # how our systems' names begin
Values = dict[str, Any]


def tables(parts: Values) -> list[Table]:
    """Everything there is to say: parts that did not run say nothing."""
    found: list[Table] = []
    if "lookup" in parts:
        found += [lookups(parts["lookup"])] if parts["lookup"]["cases"] else []
        found += [tiers(parts["lookup"])] if "tiers" in parts["lookup"] else []
    if "exchange" in parts:
        found += [exchanges(parts["exchange"], ranks, served) for ranks, served in _kinds(parts["exchange"])]
    if "dlrm" in parts:
        found.append(dlrm(parts["dlrm"]))
    return [*found, goals(parts)]


def about(parts: Values) -> list[str]:
    """Where and when, in sentences."""
    lines = []
    for name, part in parts.items():
        facts, card = part["environment"], part.get("device", {})
        lines.append(
            f"{name}: {facts['date']}, commit {facts['commit']}, {card.get('name', 'no GPU')}"
            + (f" ({format_size(card['total_bytes'])}, CUDA {card['driver'] // 1000}.{card['driver'] % 1000 // 10})"
               if card else "")
            + f", {facts['cpu']}, {facts['cores']} cores; took {part['seconds']:.0f} s"
        )  # fmt: skip
        lines += [f"left out: {what}: {why}" for what, why in _skipped(part).items()]
    if "exchange" in parts and not parts["exchange"]["nccl"]["works"]:
        lines.append(f"NCCL between ranks on one GPU is not measurable: {parts['exchange']['nccl']['why']}")
    return lines


def _skipped(part: Values) -> dict[str, str]:
    found = {what: str(why).splitlines()[0] if why else "" for what, why in part.get("skipped", {}).items()}
    for case in part.get("cases", {}).values():
        found |= case["skipped"]
    return found


# --- lookups


def lookups(part: Values) -> Table:
    """Kernels on the same bags."""
    work = next(iter(part["cases"].values()))["work"]
    table = Table(
        f"Pooled lookup: {work['tables']} tables of {work['rows']:,} rows x {work['dim']} fp32, bags of "
        f"{work['pooling']}, batch {work['samples']:,}",
        ["<rows", "<kernel", "ms", "GB/s that must move", "of copy", "GB/s gathered", "of copy", "time / ours"],
        notes=["Medians of the rounds ± half the interquartile range, by CUDA events.",
               "Must move: each different row once, indices, offsets, results. Gathered: every row of every bag.",
               "Of copy: of what a device-to-device copy reaches in the same process, bytes read and written."],
    )  # fmt: skip
    for draw, case in part["cases"].items():
        copy = median(case["copy_gbs"])
        table.rows.append([draw, "copy", "", f"{copy:,.0f} {_spread(case['copy_gbs'])}", "1.00", "", "", ""])
        for name, samples in case["ms"].items():
            ms = median(samples)
            cells = [draw, name, f"{ms:.3f} {_spread(samples)}"]
            for kind in ("must_bytes", "gathered_bytes"):
                rate = case[kind] / ms / 1e6
                cells += [f"{rate:,.0f}", f"{rate / copy:.2f}"]
            table.rows.append([*cells, "" if name == "blsrdma" else _ratio(samples, case["ms"]["blsrdma"])])
    return table


def tiers(part: Values) -> Table:
    """Rows in two kinds of memory."""
    found = part["tiers"]
    work, base = found["work"], found["ms"]["all"]
    host = median(found["host_gbs"])
    table = Table(
        f"Two tiers: {work['tables']} tables of {work['rows']:,} rows, {work['draw']}; hot rows on the GPU, the others "
        "in page-locked host memory",
        ["lookups that are hot", "hot rows", "host memory", "ms", "time / all on the GPU", "GB/s from it", "of copy"],
        notes=[f"Of copy: of a copy from host memory to the GPU ({host:.1f} GB/s)."],
    )  # fmt: skip
    table.rows.append(["all", f"{work['rows']:,}", "0", f"{median(base):.3f} {_spread(base)}", "1.00", "", ""])
    for tier in found["tiers"]:
        samples = found["ms"][f"{tier['share']:g}"]
        rate = tier["cold_read"] / median(samples) / 1e6
        table.rows.append([
            f"{tier['hot']:.1%}", f"{tier['hot_rows']:,}", format_size(tier["cold_bytes"]),
            f"{median(samples):.3f} {_spread(samples)}", _ratio(samples, base), f"{rate:.1f}", f"{rate / host:.2f}",
        ])  # fmt: skip
    return table


# --- exchanges


def _kinds(part: Values) -> list[tuple[int, bool]]:
    return list(dict.fromkeys((run["ranks"], run["mps"]) for run in part["runs"]))


def _moved(run: Values) -> int:
    """Bytes that one iteration reads and writes in GPU memory, of all ranks, if nothing is staged."""
    return int(2 * run["ranks"] * (run["ranks"] - 1) * run["bytes"])


def exchanges(part: Values, ranks: int, served: bool) -> Table:
    """One row a size."""
    runs = [run for run in part["runs"] if (run["ranks"], run["mps"]) == (ranks, served)]
    systems = list(dict.fromkeys(system for run in runs for system in run["ms"]))
    ours = [system for system in systems if system.startswith(OURS)]
    table = Table(
        f"All-to-all of {ranks} ranks on one GPU, {'with MPS' if served else 'without MPS (processes take turns)'}: "
        "µs per iteration",
        ["bytes per pair", *(_called(system) for system in systems), "of copy", "gloo / ours"],
        notes=["Medians of the rounds ± half the interquartile range, by the host's clock, over the whole loop.",
               "Of copy, gloo / ours: of the fastest of ours; bytes read and written, ranks x (ranks - 1) messages."],
    )  # fmt: skip
    for run in runs:
        best = min(ours, key=lambda system: median(run["ms"][system]))
        cells = [format_size(run["bytes"])]
        for system in systems:
            samples = run["ms"].get(system)
            cells.append(f"{microseconds(1e6 * median(samples))} {_spread(samples)}" if samples else "–")
        gloo = _ratio(run["ms"]["gloo"], run["ms"][best]) if "gloo" in run["ms"] else "–"
        table.rows.append([*cells, f"{_share(run, best):.3f} ({_called(best)})", gloo])
    paths = {system: facts["paths"] for run in runs for system, facts in run["facts"].items() if "paths" in facts}
    for system, path in paths.items():
        if path != [system.split()[0]]:
            table.notes.append(f"{system} went by {', '.join(path)}.")
    return table


def _called(system: str) -> str:
    kind, _, lag = system.partition(" ")
    return f"{kind}, lag {lag}" if lag else f"{kind}, staged" if kind in ("gloo", "mpi") else kind


def _share(run: Values, system: str) -> float:
    """Of the bandwidth of a copy."""
    return float(_moved(run) / median(run["ms"][system]) / 1e6 / median(run["copy_gbs"]))


# --- DLRM


def dlrm(part: Values) -> Table:
    """The whole and its halves."""
    runs = max(map(len, part["runs"].values()))
    table = Table(
        f"DLRM of MLPerf v1's shape, {part['ranks']} ranks on one GPU, {'with' if part['mps'] else 'without'} MPS: "
        f"batch {part['batch']:,}, tables of {sum(part['rows']):,} rows x {part['dim']} fp32",
        ["<", "samples/s", "p99 ms", "ms per iteration", "time / larger half", "time / model"],
        notes=[f"Medians of {runs} runs of {part['batches']} batches ± half the interquartile range, host's clock.",
               "Dense alone: tables of one row; nothing is exchanged. Lookups and exchange alone: MLPs of one layer.",
               f"Delayed: {part['delay']}. Model: the delays as they were slept, an iteration as undelayed.",
               *(f"On rank 0's GPU, ms per iteration of {name}: " + ", ".join(f"{k} {v:.3f}" for k, v in steps.items())
                 for name, steps in ((name, one["steps_ms"]) for name, one in part["looked"].items()) if steps)],
    )  # fmt: skip
    larger = larger_half(part)
    for name, found in part["runs"].items():
        ms = [run["ms"] for run in found]
        rate = [run["samples_per_s"] for run in found]
        over = over_model(part, name)
        table.rows.append([
            name, f"{median(rate):,.0f} {_spread(rate)}", f"{median(run['p99'] for run in found):.2f}",
            f"{median(ms):.3f}", _ratio(ms, larger) if larger and not name.endswith("alone") else "",
            f"{median(over):.2f}" if over else "",
        ])  # fmt: skip
    return table


def larger_half(part: Values) -> list[float]:
    """ms per iteration of the half that takes longer alone, of each run."""
    halves = [[run["ms"] for run in part["runs"].get(name, [])]
              for name in ("dense alone", "lookups and exchange alone")]  # fmt: skip
    return max(halves, key=median) if all(halves) else []


def over_model(part: Values, name: str) -> list[float]:
    """Time of each delayed run / that of the max-plus model, whose iteration costs what an undelayed one takes at the
    same lag."""
    found: list[float] = []
    for run in part["runs"].get(name, []):
        calm = [one["ms"] for one in part["runs"].get(name.replace("delayed", "whole"), [])]
        if run["slept_ms"] and calm:
            ends = max_plus(run["slept_ms"], run["lag"], median(calm))[:, -1]
            found.append(run["ms"] * run["batches"] / float(ends.max()))
    return found


# --- what was to be reached


def goals(parts: Values) -> Table:
    """Every goal, with what was measured and a word."""
    table = Table("Goals, on one H100", ["<what", "goal", "measured", "<"])

    def row(what: str, goal: str, value: float | None, reached: bool, why: str = "not measured") -> None:
        if value is None:
            table.rows.append([what, goal, "–", why])
        else:
            table.rows.append([what, goal, f"{value:.2f}", "reached" if reached else "missed"])

    case = next(
        (case for draw, case in parts.get("lookup", {}).get("cases", {}).items() if draw.startswith("zipf")), None
    )
    share = case and case["must_bytes"] / median(case["ms"]["blsrdma"]) / 1e6 / median(case["copy_gbs"])
    row("pooled lookup, zipf: bytes that must move / copy", f">= {LOOKUP_SHARE}", share,
        bool(share and share >= LOOKUP_SHARE))  # fmt: skip
    there = case and "FBGEMM TBE" in case["ms"]
    fbgemm = median(case["ms"]["FBGEMM TBE"]) / median(case["ms"]["blsrdma"]) if case and there else None
    row("pooled lookup: speed / FBGEMM TBE", f">= {LOOKUP_FBGEMM:g}", fbgemm, bool(fbgemm and fbgemm >= LOOKUP_FBGEMM),
        "not measured: FBGEMM is not installed" if case else "not measured")  # fmt: skip
    exchange = parts.get("exchange", {"runs": []})
    for ranks, served in _kinds(exchange):
        for run in exchange["runs"]:
            if (run["ranks"], run["mps"], run["bytes"]) != (ranks, served, LARGEST):
                continue
            where = f"exchange, {ranks} ranks, 16 MiB per pair, {'with' if served else 'without'} MPS"
            best = min((s for s in run["ms"] if s.startswith(OURS)), key=lambda s: median(run["ms"][s]))
            share = _share(run, best)
            row(f"{where}: bandwidth / copy", f">= {EXCHANGE_SHARE}", share, share >= EXCHANGE_SHARE)
            gloo = median(run["ms"]["gloo"]) / median(run["ms"][best]) if "gloo" in run["ms"] else None
            row(f"{where}: speed / gloo", f">= {EXCHANGE_GLOO:g}", gloo, bool(gloo and gloo >= EXCHANGE_GLOO))
    if not any(run["bytes"] == LARGEST for run in exchange["runs"]):
        row("exchange, 16 MiB per pair: bandwidth / copy", f">= {EXCHANGE_SHARE}", None, False)
    model = parts.get("dlrm")
    larger = larger_half(model) if model else []
    whole = [run["ms"] for run in model["runs"].get(_name(model, "whole, lag"), [])] if model else []
    over = median(whole) / median(larger) if larger and whole else None
    row("DLRM: iteration / the larger of its halves alone", f"<= {DLRM_OVER}", over, bool(over and over <= DLRM_OVER))
    delayed = over_model(model, _name(model, "delayed, lag")) if model else []
    value = median(delayed) if delayed else None
    row("DLRM, delayed: iteration / model at that lag", f"<= {DELAYED}", value, bool(value and value <= DELAYED))
    return table


def _name(part: Values, begins: str) -> str:
    """Of the entry with the largest lag whose name begins so."""
    names = [name for name in part["runs"] if name.startswith(begins)]
    return max(names, key=lambda name: int(name.split()[-1]), default="")


def _spread(samples: list[float]) -> str:
    return f"±{summarise(samples).spread:.0%}"


def _ratio(above: list[float], below: list[float]) -> str:
    found = of_ratio(above, below)
    return f"{times(found.value)} ({times(found.low)}–{times(found.high)})"
