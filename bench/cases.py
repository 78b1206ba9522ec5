"""What is measured: a `Case`, and the table of message sizes that every system gets for it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blsrdma.settings import format_size, parse_size

Sizes = NDArray[np.int64]  # [phase, source, destination] in bytes; iteration i uses phase i % len

ZIPF_PHASES = 32
ZIPF_RANKS = 64  # the largest message is 64 times the smallest
DEFAULT_MEAN = 64 * 1024
HEAVY = 8  # a heavy sender's or receiver's messages are so many times those of the others
IRREGULAR = {
    "zipf": "by Zipf's law, others in each iteration",
    "sender": f"rank 0 sends {HEAVY} times as much as another",
    "receiver": f"rank 0 gets {HEAVY} times as much as another",
    "random": "anything from nothing to twice the mean, others in each iteration",
}
_ROW = 64  # irregular sizes are whole rows of 64 bytes, as embeddings are
_SEED = 20251219


@dataclass(frozen=True)
class Case:
    """One line of a table.

    bytes: '1K', or one of IRREGULAR (mean 64 KiB), or that with a mean, 'zipf:4K'.
    self_message: 'view' (nobody copies the message to oneself; peers send themselves nothing) or 'copy' (all do).
    """

    ranks: int
    bytes: str
    lag: int
    self_message: str = "view"
    read: bool = False  # every rank reads every byte it got, inside the timed part
    delay: str = "none"  # a plan of dlrm.delays

    @property
    def label(self) -> str:
        return f"{self.ranks} ranks, {bytes_label(self.bytes)}, lag {self.lag}, self {self.self_message}, {self.delay}"


def sizes(case: Case) -> Sizes:
    """The sizes of all messages of the case; the same for every system, on every machine, in every run."""
    kind, mean = pattern(case.bytes)
    if kind == "zipf":
        return _zipf(case.ranks, mean)
    if kind == "random":
        drawn = np.random.RandomState(_SEED).randint(0, 2 * mean + 1, (ZIPF_PHASES, case.ranks, case.ranks))
        return np.asarray(drawn, np.int64) // _ROW * _ROW
    if kind in ("sender", "receiver"):
        return _heavy(case.ranks, mean, kind == "sender")
    return np.full((1, case.ranks, case.ranks), mean, np.int64)


def pattern(text: str) -> tuple[str, int]:
    """Which of IRREGULAR, '' for none, and the mean. Raises ValueError for what is neither."""
    kind, _, mean = text.strip().lower().partition(":")
    if kind in IRREGULAR:
        return kind, parse_size(mean) if mean else DEFAULT_MEAN
    return "", parse_size(text)


def bytes_label(text: str) -> str:
    """'1K' as '1 KiB'; 'zipf' as 'zipf, mean 64 KiB'."""
    kind, mean = pattern(text)
    size = format_size(mean).replace(".0 ", " ")
    return f"{kind}, mean {size}" if kind else size


def size_option(text: str) -> str:
    """For argparse: sizes as they are written on the command line."""
    try:
        pattern(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is {error}, and none of {', '.join(IRREGULAR)}") from None
    return text


def average_bytes(case: Case) -> float:
    """Mean size of a message to another rank."""
    table = sizes(case)
    return float(table[:, ~np.eye(case.ranks, dtype=bool)].mean()) if case.ranks > 1 else float(table.mean())


def _heavy(ranks: int, mean: int, sender: bool) -> Sizes:
    table = np.ones((1, ranks, ranks))
    table[:, 0] = HEAVY
    table *= mean / table[:, ~np.eye(ranks, dtype=bool)].mean() if ranks > 1 else mean
    whole: Sizes = np.maximum(table.astype(np.int64) // _ROW, 1) * _ROW
    return whole if sender else whole.transpose(0, 2, 1).copy()


def _zipf(ranks: int, mean: int) -> Sizes:
    # Sizes by Zipf's law: the r-th largest is 1/r of the largest, r = 1..64, every r equally often, shuffled over
    # phases, sources and destinations. numpy's RandomState never changes its stream, so the table never changes.
    shuffle = np.random.RandomState(_SEED)
    count = ZIPF_PHASES * ranks * (ranks - 1)
    places = shuffle.permutation(np.resize(np.arange(1, ZIPF_RANKS + 1), count))
    largest = mean * ZIPF_RANKS / (1 / np.arange(1, ZIPF_RANKS + 1)).sum()
    table = np.zeros((ZIPF_PHASES, ranks, ranks), np.int64)
    table[:, ~np.eye(ranks, dtype=bool)] = (largest / places).reshape(ZIPF_PHASES, -1)
    own = shuffle.permutation(np.resize(np.arange(1, ZIPF_RANKS + 1), ZIPF_PHASES * ranks))
    table[:, np.eye(ranks, dtype=bool)] = (largest / own).reshape(ZIPF_PHASES, -1)
    return np.maximum(table // _ROW, 1) * _ROW
