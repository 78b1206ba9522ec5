"""The picture of `python -m bench alltoallv --plot`: a panel for each number of ranks (columns) and lag (rows)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.cases import Case, bytes_label, pattern
from bench.results import Results
from bench.systems import SYSTEMS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

# One colour for each runtime; dashed where several are in flight or the messages are copied out.
COLOURS = {"bls": "#d1495b", "gloo": "#8d99ae", "mpich": "#2e86ab", "openmpi": "#3a7d44", "openmpi-ucx": "#b08900"}


def draw(results: Results, path: Path) -> None:
    """Write a PNG (or what the name's ending says)."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    cases = results.cases()
    ranks = list(dict.fromkeys(case.ranks for case in cases))
    rows = list(dict.fromkeys((case.lag, case.self_message, case.read) for case in cases))
    figure, grid = plt.subplots(
        len(rows), len(ranks), figsize=(1.5 + 4.2 * len(ranks), 1.4 + 3.2 * len(rows)), squeeze=False, sharey="col",
        layout="constrained",
    )  # fmt: skip
    for line, (lag, self_message, read) in zip(grid, rows, strict=True):
        for axes, count in zip(line, ranks, strict=True):
            here = [c for c in cases if (c.ranks, c.lag, c.self_message, c.read) == (count, lag, self_message, read)]
            _panel(axes, results, here)
            kind = ", message to oneself copied" if self_message == "copy" else ""
            axes.set_title(f"{count} ranks, lag {lag}{kind}" + (", read" if read else ""), fontsize=10)
    for line in grid:
        line[0].set_ylabel("µs per iteration")
    for axes in grid[-1]:
        axes.set_xlabel("bytes per peer")
    finish(figure, grid, results, path, "medians, bars: half of all samples. Lower is better.")


def finish(figure: Figure, grid: NDArray[Any], results: Results, path: Path, note: str, dpi: int = 130) -> None:
    """One legend for all panels, the environment below them, and into `path`."""
    from matplotlib import pyplot as plt

    handles = {
        label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=min(8, len(handles)), frameon=False
    )
    e = results.environment
    about = f"{e['cpu']}, {e['cores']} cores; commit {e['commit']}, {e['date'][:10]}; {note}"
    figure.supxlabel(about, fontsize=8, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
    plt.close(figure)


def _panel(axes: Axes, results: Results, cases: list[Case]) -> None:
    places = {case.bytes: x for x, case in enumerate(cases)}
    uniform = [x for case, x in places.items() if not pattern(case)[0]]
    irregular = [x for x in places.values() if x not in uniform]
    for number, system in enumerate(results.systems()):
        points = [(places[c.bytes], m.summary) for c in cases if (m := results.of(c).get(system))]
        if not points:
            continue
        offset = (number - len(results.systems()) / 2) * 0.03  # so that bars do not hide each other
        kind = SYSTEMS[system]
        line = "-" if system == kind.runtime else "--" if system.endswith(("-nb", "-copy")) else ":"
        for part, label in ((uniform, system), (irregular, None)):
            if here := [point for point in points if point[0] in part]:
                xs, ys = [x + offset for x, _ in here], [s.median / 1000 for _, s in here]
                errors = [[(s.median - s.q1) / 1000 for _, s in here], [(s.q3 - s.median) / 1000 for _, s in here]]
                axes.errorbar(
                    xs, ys, yerr=errors, label=label, color=COLOURS.get(kind.runtime, "#6a4c93"), marker="o",
                    markersize=4, linestyle=line, linewidth=1.8 if kind.ours else 1.1, capsize=2,
                )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xticks(range(len(cases)), [bytes_label(case.bytes).replace(", ", "\n") for case in cases], fontsize=8)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    axes.grid(axis="y", which="both", linewidth=0.3)
    axes.spines[["top", "right"]].set_visible(False)
