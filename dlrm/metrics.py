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


def logloss(labels: NDArray[Any], probabilities: NDArray[Any]) -> float | None:
    """Mean binary cross entropy in nats, its logarithms at least -100 as in torch's BCELoss; None without samples."""
    if not len(labels):
        return None
    with np.errstate(divide="ignore"):
        clicked = np.maximum(np.log(probabilities.astype(np.float64)), -100.0)
        not_clicked = np.maximum(np.log1p(-probabilities.astype(np.float64)), -100.0)
    return float(-np.where(labels > 0.5, clicked, not_clicked).mean())


def normalised_entropy(labels: NDArray[Any], probabilities: NDArray[Any]) -> float | None:
    """`logloss` over that of always predicting the click rate; None where there is but one kind of label."""
    loss = logloss(labels, probabilities)
    rate = float((labels > 0.5).mean()) if len(labels) else 0.0
    if loss is None or not 0 < rate < 1:
        return None
    return float(loss / -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate)))


def percentiles(values: NDArray[np.float64]) -> dict[str, float | None]:
    """p50, p95 and p99 of `values`; None without values."""
    if not values.size:
        return dict.fromkeys(("p50", "p95", "p99"))
    return {f"p{share}": float(np.percentile(values, share)) for share in (50, 95, 99)}
