"""Both matrices of a check as one picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from blsrdma.errors import BlsrdmaError
from blsrdma.settings import format_size

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from blsrdma.links import Facts

_NUMBERS_UP_TO = 16  # ranks


def draw(path: Path, ranks: Sequence[Facts | None], message_bytes: int) -> None:
    """Write a picture: latency and bandwidth of every link. Raises BlsrdmaError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise BlsrdmaError("--plot needs matplotlib: pip install 'blsrdma[demo]'") from None
    figure = Figure(figsize=(13, 5.6), layout="constrained")
    size = len(ranks)
    latency = [each.latency if each else {} for each in ranks]
    bandwidth = [each.bandwidth if each else {} for each in ranks]
    for number, (title, unit, rows, scale) in enumerate(
        [
            ("latency, 8 bytes each way", "us", latency, 1.0),
            (f"bandwidth, {format_size(message_bytes)}", "GB/s", bandwidth, 1e9),
        ]
    ):
        axes = figure.add_subplot(1, 2, number + 1)
        values = matrix(rows) / scale
        bad_is_dark = "viridis_r" if unit == "us" else "viridis"
        image = axes.imshow(values, cmap=bad_is_dark)
        axes.set(title=title, xlabel="to rank", ylabel="rank")
        axes.set_xticks(_ticks(size))
        axes.set_yticks(_ticks(size))
        figure.colorbar(image, ax=axes, label=unit)
        if size <= _NUMBERS_UP_TO:
            middle = np.nanmean(values) if np.isfinite(values).any() else 0.0
            for (row, column), value in np.ndenumerate(values):
                if np.isfinite(value):
                    dark = (value > middle) == (unit == "us")
                    axes.text(column, row, f"{value:.3g}", ha="center", va="center", color="white" if dark else "black",
                              fontsize=8)  # fmt: skip
    figure.savefig(path, dpi=110)


def matrix(rows: Sequence[Mapping[int, float]]) -> NDArray[np.float64]:
    """Row r, column c: from rank r to rank c; NaN where nothing was measured."""
    values = np.full((len(rows), len(rows)), np.nan)
    for rank, row in enumerate(rows):
        for other, value in row.items():
            values[rank, other] = value
    return values


def _ticks(size: int) -> list[int]:
    return list(range(0, size, max(1, size // 16)))
