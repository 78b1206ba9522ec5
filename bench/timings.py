"""Timings of the user's own job, read: how long each rank was busy in each iteration, not counting what it waited for
others. From blsrdma's trace (BLSRDMA_TRACE=folder), or from a CSV file of rank, iteration, seconds.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from blsrdma import trace
from blsrdma.errors import BlsrdmaError
from blsrdma.trace import RankTrace

COLUMNS = ("rank", "iteration", "seconds")


class TimingsError(BlsrdmaError, ValueError):
    """A file or folder does not hold the timings of a whole job: which, where in it, and why."""


@dataclass(frozen=True)
class Timings:
    """Of one job."""

    source: str
    busy: NDArray[np.float64]  # (ranks, iterations), seconds outside of calls that waited for another rank
    delivery: float = 0.0  # seconds that such a call took on, after the last rank had posted: transfer, waking up
    lag: int | None = None  # that the job ran with, where known
    measured: float | None = None  # seconds per iteration as it ran, where known


def from_csv(path: Path) -> Timings:
    """Lines of rank, iteration, seconds, in any order, under a header with these names; other columns are ignored.
    Every rank from 0 on has every iteration from the first to the last. Raises TimingsError."""
    found: dict[tuple[int, int], float] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file)
            header = [name.strip().lower() for name in next(lines, [])]
            if missing := [name for name in COLUMNS if name not in header]:
                raise TimingsError(f"{path}, line 1: no column {missing[0]!r}: the header must name {_listed(COLUMNS)}")
            places = [header.index(name) for name in COLUMNS]
            for fields in lines:
                if not fields:
                    continue
                where = f"{path}, line {lines.line_num}"
                if len(fields) <= max(places):
                    raise TimingsError(f"{where}: {len(fields)} fields, the header has {len(header)}")
                rank, iteration, seconds = (fields[place].strip() for place in places)
                key = _count(rank, "rank", where), _count(iteration, "iteration", where)
                if key in found:
                    raise TimingsError(f"{where}: rank {rank} has iteration {iteration} already")
                found[key] = _seconds(seconds, where)
    except OSError as error:
        raise TimingsError(f"{path}: {error.strerror}") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise TimingsError(f"{path} is not a CSV file: {error}") from None
    return Timings(str(path), _whole(found, str(path)))


def from_trace(folder: Path, name: str | None = None) -> Timings:
    """Of the exchange `name`, which may be left out where the folder has one. Raises BlsrdmaError."""
    exchanges = trace.load(folder)
    if name is None and len(exchanges) > 1:
        raise TimingsError(f"{folder} has the exchanges {_listed(sorted(exchanges))}: say which")
    if name is not None and name not in exchanges:
        raise TimingsError(f"{folder} has no exchange {name!r}, but {_listed(sorted(exchanges))}")
    ranks = exchanges[name] if name is not None else next(iter(exchanges.values()))
    size = int(ranks[0].about["world_size"])
    if absent := sorted(set(range(size)) - {int(rank.about["rank"]) for rank in ranks}):
        raise TimingsError(f"{folder}: the trace of rank {absent[0]} of {size} is missing")
    return _of_ranks(str(folder), ranks)


def _of_ranks(source: str, ranks: Sequence[RankTrace]) -> Timings:
    begins = [_begins(rank) for rank in ranks]
    first = max((int(rows[0, 0]) for rows in begins if len(rows)), default=0)
    last = min((int(rows[-1, 0]) if len(rows) else -1 for rows in begins), default=-1)
    if last - first < 2:
        raise TimingsError(f"{source}: fewer than two whole iterations that all ranks have recorded")
    # An iteration lasts from its begin to the next one's; so the last has no known end, and is left out.
    starts = np.array([rows[(rows[:, 0] >= first) & (rows[:, 0] <= last), 1] for rows in begins])
    busy = np.diff(starts) / 1e9
    late = []
    for rank, (own, begun) in enumerate(zip(ranks, starts, strict=True)):
        at, length, after = _waits(own, ranks)
        inside = (at >= begun[0]) & (at < begun[-1])
        which = np.searchsorted(begun, at[inside], "right") - 1
        np.subtract.at(busy[rank], which, length[inside] / 1e9)
        late.append(after[inside & (length > 0)] / 1e9)
    measured = float(starts[:, -1].max() - starts[:, 0].max()) / 1e9 / busy.shape[1]
    all_late = np.concatenate(late)
    delivery = float(all_late.mean()) if len(all_late) else 0.0
    return Timings(source, np.maximum(busy, 0.0), delivery, int(ranks[0].about["lag"]), measured)


def _begins(rank: RankTrace) -> NDArray[np.int64]:
    """Rows of (iteration, start): of begin(), or of post(), where the loop has no begin()."""
    rows = np.concatenate([rank.of("begin"), rank.posts])[:, [1, 2]]
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    earliest: NDArray[np.int64] = rows[np.unique(rows[:, 0], return_index=True)[1]]
    return earliest


def _waits(
    rank: RankTrace, ranks: Sequence[RankTrace]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The calls that had to wait for another rank's post: when each began, how long it took, and how much of that after
    the post (ns). Of a call inside another one nothing is counted twice."""
    rows, last, posted = rank.waits(ranks)
    waiting = last >= 0
    start, end, post = rows[waiting, 2], rows[waiting, 3], posted[waiting]
    before = np.maximum.accumulate(np.concatenate([[0], end]))[:-1]
    length = np.maximum(end - np.maximum(start, before), 0)
    return start, length, np.minimum(length, np.maximum(end - post, 0))


def _whole(found: dict[tuple[int, int], float], source: str) -> NDArray[np.float64]:
    if not found:
        raise TimingsError(f"{source}, line 2: no timings under the header")
    ranks = max(rank for rank, _ in found) + 1
    first = min(iteration for _, iteration in found)
    iterations = max(iteration for _, iteration in found) + 1 - first
    if len(found) != ranks * iterations:  # looked for by what is there: a wild number must not cost memory
        counts: dict[int, int] = {}
        for rank, _ in found:
            counts[rank] = counts.get(rank, 0) + 1
        rank = next(rank for rank in range(ranks) if counts.get(rank, 0) < iterations)
        gap = next(i for i in range(first, first + iterations) if (rank, i) not in found)
        raise TimingsError(
            f"{source}: rank {rank} has no iteration {gap}; there are ranks 0 to {ranks - 1} and iterations {first} to "
            f"{first + iterations - 1}"
        )
    busy = np.empty((ranks, iterations))
    for (rank, iteration), seconds in found.items():
        busy[rank, iteration - first] = seconds
    return busy


def _count(text: str, name: str, where: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise TimingsError(f"{where}: {name} is {text!r}, not an integer >= 0")
    return int(text)


def _seconds(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < inf:
        raise TimingsError(f"{where}: seconds is {text!r}, not a number >= 0")
    return value


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
