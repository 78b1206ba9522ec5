"""What is measured: a `Case`, and the table of message sizes that every system gets for it."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from blsrdma.settings import format_size, parse_size

Sizes = NDArray[np.int64]  # [phase, source, destination] in bytes; iteration i uses phase i % len

ZIPF_PHASES = 32
ZIPF_RANKS = 64  # the largest message is 64 times the smallest
ZIPF_MEAN = 64 * 1024
_ROW = 64  # irregular sizes are whole rows of 64 bytes, as embeddings are
_SEED = 20251219


@dataclass(frozen=True)
class Case:
    """One line of a table.

    bytes: '1K', or 'zipf' (mean 64 KiB), or 'zipf:MEAN'.
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
    mean = zipf_mean(case.bytes)
    if mean is None:
        return np.full((1, case.ranks, case.ranks), parse_size(case.bytes), np.int64)
    return _zipf(case.ranks, mean)


def zipf_mean(text: str) -> int | None:
    """The mean of an irregular case; None for a uniform one. Raises ValueError for what is neither."""
    found = re.fullmatch(r"zipf(?::(.+))?", text.strip(), re.IGNORECASE)
    if not found:
        parse_size(text)
        return None
    return parse_size(found[1]) if found[1] else ZIPF_MEAN


def bytes_label(text: str) -> str:
    """'1K' as '1 KiB'; 'zipf' as 'zipf, mean 64 KiB'."""
    mean = zipf_mean(text)
    size = format_size(parse_size(text) if mean is None else mean).replace(".0 ", " ")
    return size if mean is None else f"zipf, mean {size}"


def size_option(text: str) -> str:
    """For argparse: sizes as they are written on the command line."""
    try:
        zipf_mean(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is {error}, and not zipf or zipf:MEAN") from None
    return text


def average_bytes(case: Case) -> float:
    """Mean size of a message to another rank."""
    table = sizes(case)
    return float(table[:, ~np.eye(case.ranks, dtype=bool)].mean()) if case.ranks > 1 else float(table.mean())


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
