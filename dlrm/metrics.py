"""Numbers about predictions and about times."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def auc(labels: NDArray[Any], scores: NDArray[Any]) -> float | None:
    """Area under the ROC curve, exact: the share of (clicked, not clicked) pairs in the right order, ties half.

    Labels are 0 or 1. None where one of the two is absent.
    """
    positive = labels > 0.5
    clicked, others = int(positive.sum()), int((~positive).sum())
    if not clicked or not others:
        return None
    _, which, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts - 1) / 2.0  # mean rank, from 1, of each distinct score
    return float((ranks[which][positive].sum() - clicked * (clicked + 1) / 2.0) / (clicked * others))


def accuracy(labels: NDArray[Any], probabilities: NDArray[Any]) -> float | None:
    """Share of samples whose rounded probability is the label, as the reference has it; None without samples."""
    return float(((probabilities >= 0.5) == (labels > 0.5)).mean()) if len(labels) else None


def percentiles(values: NDArray[np.float64]) -> dict[str, float | None]:
    """p50, p95 and p99 of `values`; None without values."""
    if not values.size:
        return dict.fromkeys(("p50", "p95", "p99"))
    return {f"p{share}": float(np.percentile(values, share)) for share in (50, 95, 99)}
