"""The picture of `python -m bench delays --plot`: a panel for each delay (columns), ranks and size (rows)."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from bench.cases import Case, bytes_label
from bench.delay_report import OURS, modelled, undelayed
from bench.plot import COLOURS, finish
from bench.results import Results
from bench.systems import SYSTEMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(results: Results, path: Path) -> None:
    """Write a PNG, or what the name's ending says."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    cases = results.cases()
    kinds = list(dict.fromkeys((case.ranks, case.bytes) for case in cases))
    plans = list(dict.fromkeys(case.delay for case in cases))
    figure, grid = plt.subplots(
        len(kinds), len(plans), figsize=(1.5 + 2.9 * len(plans), 1.5 + 2.8 * len(kinds)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for line, (ranks, size) in zip(grid, kinds, strict=True):
        for axes, plan in zip(line, plans, strict=True):
            _panel(axes, results, [c for c in cases if (c.ranks, c.bytes, c.delay) == (ranks, size, plan)])
            axes.set_title(f"{plan}\n{ranks} ranks, {bytes_label(size)}", fontsize=8)
        line[0].set_ylabel("ms per iteration")
    for axes in grid[-1]:
        axes.set_xlabel("lag")
    finish(figure, grid, results, path, "medians. Lower is better.", dpi=110)


def _panel(axes: Axes, results: Results, cases: list[Case]) -> None:
    places = {case.lag: x for x, case in enumerate(cases)}
    for system in results.systems():
        points = [(places[c.lag], m.summary.median / 1e6) for c in cases if (m := results.of(c).get(system))]
        if points:
            kind = SYSTEMS[system]
            style = ":" if kind.blocking else "-" if system == kind.runtime else "--"
            axes.plot(*zip(*points, strict=True), style, marker=".", color=COLOURS.get(kind.runtime), label=system)
    ours = [(places[c.lag], m, undelayed(results, c)) for c in cases if (m := results.of(c).get(OURS))]
    if ours:
        levels = [median(modelled(m, m.case.lag, cost)) / 1e6 for _, m, cost in ours]
        axes.plot([x for x, _, _ in ours], levels, color="black", linewidth=0.8, marker="_", label="model")
    axes.set_xticks(list(places.values()), [str(lag) for lag in places])
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
