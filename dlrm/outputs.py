"""What the ranks bring together: outputs in sample order, and files of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from dlrm.loop import Predictions


def in_sample_order(by_rank: list[NDArray[np.float32]], cuts: list[NDArray[np.int64]]) -> NDArray[np.float32]:
    """[3, samples] from each rank's [3, n], cut into pieces (first, samples) of the run."""
    places = [cut.reshape(-1, 2) for cut in cuts]
    total = sum(int(cut[:, 1].sum()) for cut in places)
    ordered = np.empty((3, total), np.float32)
    for flat, cut in zip(by_rank, places, strict=True):
        mine, at = flat.reshape(3, -1), 0
        for first, samples in cut.tolist():
            ordered[:, first : first + samples] = mine[:, at : at + samples]
            at += samples
    return ordered


def kept_pooled(result: Predictions) -> NDArray[np.float32]:
    """The pooled vectors of a result that keeps them, [n, T, dim]."""
    assert result.pooled is not None
    return result.pooled.numpy()


def save_predictions(path: str, probabilities: NDArray[np.float32]) -> None:
    """Write click probabilities in sample order: .npy float32 [samples], or .csv with columns sample, probability."""
    if path.endswith(".npy"):
        np.save(path, probabilities)
        return
    with Path(path).open("w", encoding="ascii") as stream:
        stream.write("sample,probability\n")
        stream.writelines(f"{sample},{value:.9g}\n" for sample, value in enumerate(probabilities.tolist()))
