"""The picture of `python -m bench lookups --plot`: time per iteration of each case and system, with the models."""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.lookups import Runs

_COLOURS = {"alltoallv": "#8d99ae", "put": "#d1495b", "get": "#2e86ab"}
_CASES = ("undelayed", "exponential", "rotating", "one sleeps")


def draw(runs: Runs, options: argparse.Namespace, facts: dict[str, Any], path: Path) -> None:
    """Write a PNG (or what the name's ending says)."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    from bench.lookups import SYSTEMS, cost, models

    c = cost(runs)
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    width = 0.26
    for x, case in enumerate(_CASES):
        for k, system in enumerate(SYSTEMS):
            found = runs.results[case, system]
            values = sorted(each["ms"] for each in found)
            at = x + (k - 1) * width
            axes.bar(at, median(values), width * 0.9, color=_COLOURS[system], label=system if x == 0 else None)
            axes.plot([at, at], [values[0], values[-1]], color="black", linewidth=0.8)
            each = [models(run, options.lag, c) for run in found]
            for n, (style, name) in enumerate(
                ((":", "synchronous"), ("--", f"lag {options.lag}"), ("-", "no synchronisation"))
            ):
                level = median(model[n] for model in each)
                label = f"model: {name}" if x == k == 0 else None
                ends = [at - width / 2, at + width / 2]
                axes.plot(ends, [level, level], color="#222222", linestyle=style, linewidth=1.1, label=label)
    axes.set_xticks(range(len(_CASES)), _CASES)
    axes.set_ylabel("ms per iteration")
    axes.grid(axis="y", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    axes.set_title(
        f"Lookups of {options.ranks} ranks, lag {options.lag}; {facts['cpu']}, {facts['cores']} cores; commit "
        f"{facts['commit']}, {facts['date'][:10]}. Lower is better.", fontsize=8, color="#555555",
    )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
