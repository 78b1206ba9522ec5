"""The picture of the demo: throughput by lag against the model's floor, and what the ranks did over time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.layout_engine import ConstrainedLayoutEngine

from dlrm import timeline

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes

    from dlrm.report import Report

# Okabe and Ito's colours, told apart by everyone.
_RANK_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_CALM, _DELAYED = "#56606b", "#0072B2"
_INK, _FAINT = "#23272e", "#d9dde2"
_SHOWN = 48  # iterations in the timelines

_STYLE: Any = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": _INK,
    "axes.edgecolor": "#9aa3ad",
    "axes.labelcolor": _INK,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}


def draw(reports: list[Report], path: Path) -> None:
    """Draw the runs of the demo (the same lags without and with delays) into a PNG file."""
    delays = list(dict.fromkeys(report.values["settings"]["delay"] for report in reports))
    groups = [[report for report in reports if report.values["settings"]["delay"] == delay] for delay in delays]
    with plt.rc_context(_STYLE):
        figure = plt.figure(figsize=(12.5, 5.6), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        ranks, plan = reports[-1].values["ranks"], reports[-1].values["settings"]["delay"]
        title = f"DLRM inference on {ranks} ranks of one machine, verified bit by bit. Delays: {plan}"
        figure.suptitle(title, fontsize=10)
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(1, 1.25))[0]
        _throughput(left.subplots(), groups)
        delayed = groups[-1]
        _timelines(right.subplots(2, 1, sharex=True, sharey=True), [delayed[0], delayed[-1]])
        figure.savefig(path, dpi=160, facecolor="white")
        plt.close(figure)


def _throughput(axes: Axes, groups: list[list[Report]]) -> None:
    top = 0.0
    lags = np.arange(len(groups[0]))
    for group, colour, name in zip(groups, (_CALM, _DELAYED), ("without delays", "with random delays"), strict=True):
        measured = [report.values["samples_per_s"] / 1e3 for report in group]
        model = [report.values["samples"] / report.values["floor_ms"] for report in group]
        axes.plot(lags, model, "--", color=colour, linewidth=1.4, alpha=0.8)
        axes.plot(lags, measured, "o-", color=colour, linewidth=2.4, markersize=7, label=name)
        axes.fill_between(lags, measured, model, color=colour, alpha=0.09, linewidth=0)
        top = max(top, *measured, *model)
    base = groups[-1][0].values["samples_per_s"]
    for lag, report in zip(lags[1:], groups[-1][1:], strict=True):
        rate = report.values["samples_per_s"]
        place: Any = {"textcoords": "offset points", "ha": "center", "va": "top"}
        axes.annotate(f"×{rate / base:.2f}", (lag, rate / 1e3), (0, -8), color=_DELAYED, weight="bold", **place)
    axes.plot([], [], "--", color=_INK, linewidth=1.4, label="most that the lag bound allows")
    axes.legend(loc="upper left", fontsize=9)
    axes.set_title("Throughput by lag")
    axes.set_xticks(lags, [str(report.values["lag"]) for report in groups[0]])
    axes.set_xlim(-0.2, lags[-1] + 0.2)
    axes.set_ylim(0, top * 1.3)
    axes.set_xlabel("lag: iterations a rank may be ahead of the slowest")
    axes.set_ylabel("thousand samples / s")


def _timelines(panels: Any, reports: list[Report]) -> None:
    for axes, report in zip(panels, reports, strict=True):
        runs = np.stack([one[:-1] for one in report.timelines])
        start = min(int(one[-1][0]) for one in report.timelines)
        shown = min(_SHOWN, runs.shape[1])
        lag = report.values["lag"]
        for rank, colour in zip(range(len(runs)), _RANK_COLOURS, strict=False):
            begin = (runs[rank, :shown, timeline.BEGIN] - start) / 1e6
            slept = runs[rank, :shown, timeline.SLEPT] / 1e6
            axes.plot(
                begin, np.arange(shown), color=colour, linewidth=1.3, drawstyle="steps-post", label=f"rank {rank}"
            )
            for i in np.flatnonzero(slept):
                axes.plot([begin[i], begin[i] + slept[i]], [i, i], color=colour, linewidth=4, solid_capstyle="round")
        axes.set_title("Lag 0: one rank stalls, all wait" if lag == 0 else f"Lag {lag}: the others go on")
        axes.set_ylabel("iteration")
        axes.set_ylim(-1, shown + 1)
    panels[0].legend(loc="lower right", ncols=2, fontsize=9, title="thick: injected delay", title_fontsize=9)
    panels[-1].set_xlabel("milliseconds since the start")
    panels[-1].set_xlim(left=0)
