"""The figures of a report, each as PNG and as SVG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from bench import delay_plot
from bench.paper.dlrm import NONE
from bench.paper.folder import Part
from bench.paper.goals import P99, served
from bench.paper.served import Served
from bench.paper.synthetic import SIZE
from bench.paper.where import LAGS, MEANS, SLOW
from bench.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIDES = (".png", ".svg")
CAPTIONS = {
    "delays": "The all-to-all alone under delays, at each lag: time per iteration. Lower is better.",
    "dlrm": "A whole model: speed over the best synchronous system, undelayed and delayed.",
    "latency": "Open loop under delays: 99th percentiles of latency, and the model's.",
    "where": "Where a lag helps: simulated speed over lag 0.",
}


def draw(parts: Mapping[str, Part], folder: Path) -> list[str]:
    """All that the parts give; their names."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.hashsalt": "bench", "font.size": 8})
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    if part := parts.get("synthetic"):
        results = Results.of_values(part.values["results"])
        results.measurements = [m for m in results.measurements if m.case.bytes == SIZE]
        for side in SIDES:
            delay_plot.draw(results, folder / f"delays{side}")
        names.append("delays")
    for name, figure in _figures(parts):
        for side in SIDES:
            figure.savefig(folder / f"{name}{side}", dpi=100, metadata={"Date": None} if side == ".svg" else {})
        names.append(name)
    return names


def _figures(parts: Mapping[str, Part]) -> Iterator[tuple[str, Figure]]:
    models = served(parts)
    if models:
        yield "dlrm", _dlrm(list(models.values()))
    if "balanced" in models and any(case.startswith("load") for case in models["balanced"].cases()):
        yield "latency", _latency(models["balanced"])
    if part := parts.get("where"):
        yield "where", _maps(part)


def _dlrm(models: list[Served]) -> Figure:
    from matplotlib.figure import Figure

    panels = [(one, case) for one in models for case in (NONE, *one.levels())]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.1 * columns, 2.2 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, (one, case) in zip(grid, panels, strict=False):
        names = one.systems(case)
        sync = one.best(case, one.synchronous(case))
        ratios = [one.ratio(case, sync, name) for name in names]
        errors = [[r.value - r.low for r in ratios], [r.high - r.value for r in ratios]]
        colours = ["#d1495b" if name in one.ours(case) else "#2e86ab" if name in one.peers(case) else "#8d99ae"
                   for name in names]  # fmt: skip
        axes.barh(names, [r.value for r in ratios], xerr=errors, color=colours, error_kw={"linewidth": 0.8})
        axes.axvline(1, color="black", linewidth=0.6)
        axes.invert_yaxis()
        axes.tick_params(axis="y", labelsize=6)
        axes.set_title(f"{one.name}, " + ("undelayed" if case == NONE else f"delays of {case} iterations"), fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _latency(one: Served) -> Figure:
    from matplotlib.figure import Figure

    loads = [case for case in one.cases() if case.startswith("load")]
    figure = Figure(figsize=(6.5, 3.2), layout="constrained")
    axes = figure.subplots()
    x = [float(case.removeprefix("load ")) * 100 for case in loads]
    colours: dict[str, Any] = {}
    for name in (name for name in one.systems(loads[0]) if all(one.times(case, name) for case in loads)):
        y = [float(np.median(one.latency(case, name)[:, P99])) for case in loads]
        style = "-" if name in one.ours(loads[0]) else "--"
        colours[name] = axes.plot(x, y, style, marker=".", label=name)[0].get_color()
        model = [median(one.model_latency(case, name)[:, P99]) for case in loads]
        axes.plot(x, model, ":", color=colours[name], linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xlabel("load, % of the synchronous capacity under these delays")
    axes.set_ylabel("p99, ms (dotted: the model)")
    figure.legend(fontsize=6, frameon=False, loc="outside right upper")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _maps(part: Part) -> Figure:
    from matplotlib.figure import Figure

    ranks = [f"{count}" for count in part.values["ranks"]]
    lags = ["∞" if lag == float("inf") else f"{lag:g}" for lag in LAGS]
    means = [f"{mean:g}" for mean in MEANS]
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    panels = figure.subplots(1, 4)
    _map(panels[0], part.arrays["mean"], means, lags, "delay / work", "lag", "4 ranks")
    _map(panels[1], part.arrays["slow"], [f"{x:g}" for x in SLOW], lags, "slowest / others", "lag", "4 ranks, delay 5")
    _map(panels[2], part.arrays["ranks"], ranks, lags, "ranks", "lag", "delay 5")
    _map(panels[3], part.arrays["ranks, mean"], ranks, means, "ranks", "delay / work", "lag 8")
    return figure


def _map(axes: Axes, gain: Any, rows: list[str], columns: list[str], y: str, x: str, title: str) -> None:
    axes.imshow(np.log(gain), cmap="magma_r", aspect="auto", vmin=0, vmax=np.log(12), origin="lower")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.set_title(f"speed / lag 0: {title}", fontsize=8)
    for row in range(len(rows)):
        for column in range(len(columns)):
            value = float(gain[row, column])
            axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=6,
                      color="white" if value > 3 else "black")  # fmt: skip
