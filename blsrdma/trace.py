"""A timeline of all ranks, to see the lag at a glance: each rank records, `python -m blsrdma trace` merges.

A rank with the setting `trace` (BLSRDMA_TRACE=folder) records when each begin, post, wait and release started and
ended, and writes `folder/trace-<name>-rank<r>.json` when it closes. Merged, they are one Chrome trace, which
ui.perfetto.dev opens. Per rank it has

    loop         iterations (from one begin to the next); in them begin, post and wait, with the rank that came last
    in flight    lag + 1 tracks: an iteration from its post to its release

and, in a process of its own, a counter per rank: its lead, which is the iteration it has begun minus the number of
iterations the slowest has posted; it never exceeds the lag.

Times are CLOCK_MONOTONIC, which is one clock for all processes of a host. Hosts are laid side by side by their wall
clocks: between hosts the picture is as exact as these are (NTP: about a millisecond).
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import socket
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import monotonic_ns, time_ns
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from blsrdma.errors import BlsrdmaError, SettingsError
from blsrdma.hosts import host_id

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    Times: TypeAlias = NDArray[np.int64]

log = logging.getLogger("blsrdma")

CAPACITY = 1_000_000  # newest events kept per rank: 32 MB, taken as it fills
_VERSION = 1  # of the ranks' files
_KIND, _ITERATION, _START, _END = range(4)
_NEVER = 1 << 62


class Trace:
    """Records one rank's calls. Not for several threads at once, as an Exchange is not."""

    def __init__(
        self, folder: str | os.PathLike[str], name: str, rank: int, world_size: int, lag: int, capacity: int = CAPACITY
    ) -> None:
        """Raises SettingsError where nothing can be written. Removes this rank's trace of an earlier run."""
        self.path = Path(folder) / f"trace-{quote(name, safe='')}-rank{rank}.json"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._unfinished = self.path.with_suffix(".unfinished")
            self._unfinished.touch()
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise SettingsError(f"trace = {str(folder)!r}: cannot write there: {error}") from None
        self._about = {"version": _VERSION, "name": name, "rank": rank, "world_size": world_size, "lag": lag}
        self._ring = mmap.mmap(-1, capacity * 32)  # memory that is not written to is not taken
        self._capacity = capacity
        self._pack = struct.Struct("4q").pack_into
        self._kinds: dict[str, int] = {}
        self._count = 0

    def span(self, kind: str, iteration: int, start: int) -> None:
        """Something that began at `start` (time.monotonic_ns()) ends now."""
        kinds, count = self._kinds, self._count
        self._count = count + 1
        place, code = count % self._capacity * 32, kinds.setdefault(kind, len(kinds))
        self._pack(self._ring, place, code, iteration, start, monotonic_ns())

    def call(self, kind: str, iteration: int, start: int, outcome: int) -> None:
        """A call of the exchange's that began at `start` and ends now; native/calls.h says so."""
        if outcome:  # as in "wait: TIMEOUT"
            from blsrdma.ucx import native

            kind = f"{kind}: {str(native.Outcome(outcome)).rpartition('.')[2]}"
        self.span(kind, iteration, start)

    def write(self) -> None:
        """Write the rank's file. Failure is logged: a run does not fail for its picture."""
        kept = min(self._count, self._capacity)
        rows = np.frombuffer(self._ring, np.int64, 4 * kept).reshape(kept, 4)
        if self._count > kept:
            rows = np.roll(rows, -(self._count % kept), axis=0)
        content = {
            **self._about, "host": socket.gethostname(), "pid": os.getpid(), "clock": host_id(),
            "wall_ns": time_ns() - monotonic_ns(), "dropped": self._count - kept, "kinds": list(self._kinds),
            "events": rows.tolist(),
        }  # fmt: skip
        try:
            self._unfinished.write_text(json.dumps(content))
            self._unfinished.rename(self.path)
            log.info("trace: %d events in %s, %d older ones dropped", kept, self.path, self._count - kept)
        except OSError as error:
            log.warning("trace: cannot write %s: %s", self.path, error)


@dataclass(frozen=True)
class RankTrace:
    """One rank's file, on the common clock."""

    about: dict[str, Any]
    events: Times  # rows of (kind, iteration, start, end), in the order in which they ended

    def of(self, kind: str) -> Times:
        """The events of a kind, in order."""
        codes = [code for code, name in enumerate(self.about["kinds"]) if name == kind]
        return self.events[np.isin(self.events[:, _KIND], codes)]

    @cached_property
    def posts(self) -> Times:
        return self.of("post")

    def posted(self, iterations: Times) -> Times:
        """When each was posted (when post() was called); -1 where that is not known."""
        if not len(self.posts):
            return np.full(len(iterations), -1)
        index = iterations - self.posts[0, _ITERATION]
        known = (index >= 0) & (index < len(self.posts))
        return np.where(known, self.posts[np.clip(index, 0, len(self.posts) - 1), _START], -1)

    @cached_property
    def begun(self) -> Times:
        """Rows of (iteration, when work on it began): when begin() returned; post(), where the loop has no begin()."""
        rows = np.concatenate([self.of("begin"), self.posts])[:, [_ITERATION, _END]]
        rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
        earliest: Times = rows[np.unique(rows[:, 0], return_index=True)[1]]
        return earliest

    def waits(self, ranks: Sequence[RankTrace]) -> tuple[Times, Times, Times]:
        """This rank's events, in order of their starts; for each the index in `ranks` of the one it really waited for,
        which is who posted last, after the wait had started, or -1 if it waited for nobody; and when that one posted.
        """
        rows, kinds = self.events[np.lexsort((-self.events[:, _END], self.events[:, _START]))], self.about["kinds"]
        # wait(i) needs everyone's i; begin(i), and post(i) without it, everyone's i - lag - 1; the rest nobody's.
        behind = {"wait": 0, "begin": self.about["lag"] + 1, "post": self.about["lag"] + 1}
        distance = np.array([behind.get(kind, _NEVER) for kind in kinds] or [0])[rows[:, _KIND]]
        posted = np.array([trace.posted(rows[:, _ITERATION] - distance) for trace in ranks])
        when = posted.max(axis=0)
        return rows, np.where(when > rows[:, _START], posted.argmax(axis=0), -1), when


def load(folder: Path, first: int = 0, last: int = _NEVER) -> dict[str, list[RankTrace]]:
    """All ranks' files of a folder, by the exchange's name, in rank order; of them the iterations `first` to `last`.
    Raises BlsrdmaError."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("trace-*-rank*.json")):
        try:
            content = json.loads(path.read_text())
            if content["version"] != _VERSION:
                raise BlsrdmaError(f"{path} is of version {content['version']}, this blsrdma reads {_VERSION}")
            content["events"] = np.array(content["events"], np.int64).reshape(-1, 4)
            found.setdefault(content["name"], []).append({**content, "written": path.stat().st_mtime})
        except (ValueError, KeyError, TypeError) as error:
            raise BlsrdmaError(f"{path} is not a rank's trace: {type(error).__name__}: {error}") from None
    if not found:
        raise BlsrdmaError(f"no trace-*-rank*.json in {folder}: run with BLSRDMA_TRACE={folder}, to the end (close())")
    walls: dict[str, int] = {}  # one offset per clock, not per process: on a host the monotonic clock is exact
    traces: dict[str, list[RankTrace]] = {}
    for name, ranks in found.items():
        newest = max(ranks, key=lambda about: float(about["written"]))  # files of a larger, earlier run may lie there
        for about in sorted(ranks, key=lambda about: int(about["rank"])):
            if about["world_size"] == newest["world_size"]:
                events = about.pop("events")
                events[:, _START:] += walls.setdefault(about["clock"], about["wall_ns"])
                wanted = (events[:, _ITERATION] >= first) & (events[:, _ITERATION] <= last)
                traces.setdefault(name, []).append(RankTrace(about, events[wanted]))
    return traces


def leads(traces: Sequence[RankTrace]) -> list[tuple[Times, Times]]:
    """For each rank, (times, lead from then on): iterations begun ahead of the number that the slowest has posted."""
    # A peer has posted from the start of its post on, which is before anyone can have seen it: so no lead appears
    # larger than it was. Before the last rank's first event nothing can be said: older ones may have been dropped.
    since = max((trace.events[:, _START].min() for trace in traces if len(trace.events)), default=0)
    times = np.unique(np.concatenate([part for t in traces for part in (t.posts[:, _START], t.begun[:, 1])]))
    times = times[times >= since]
    slowest = np.full(len(times), _NEVER)
    for trace in traces:
        before = trace.posts[0, _ITERATION] if len(trace.posts) else 0
        slowest = np.minimum(slowest, before + np.searchsorted(trace.posts[:, _START], times, "right"))
    result = []
    for trace in traces:
        begun = np.concatenate([[0], trace.begun[:, 0]])[np.searchsorted(trace.begun[:, 1], times, "right")]
        lead = np.maximum(begun - slowest, 0)
        changes = np.flatnonzero(np.diff(lead, prepend=-1))
        result.append((times[changes], lead[changes]))
    return result


def chrome(exchanges: Mapping[str, Sequence[RankTrace]]) -> Iterator[dict[str, Any]]:
    """Events in Chrome's trace format. pid is the rank; a second exchange's follow the first one's."""
    since = min((int(t.events[:, _START].min()) for ts in exchanges.values() for t in ts if len(t.events)), default=0)
    base = 0
    for name, ranks in exchanges.items():
        several = f" of {name!r}" if len(exchanges) > 1 else ""
        world_size = int(ranks[0].about["world_size"])
        yield from _titles(base + world_size, 2 * base - 1, "lead: iterations ahead of the slowest" + several, {})
        for trace, (times, lead) in zip(ranks, leads(ranks), strict=True):
            about, pid = trace.about, base + trace.about["rank"]
            slots = {2 + slot: f"in flight {slot}" for slot in range(about["lag"] + 1)}
            title = f"rank {about['rank']}{several} (pid {about['pid']} on {about['host']})"
            yield from _titles(pid, 2 * pid, title, {1: "loop", **slots})
            for event in _slices(trace, ranks, base):
                yield {**event, "ts": (event["ts"] - since) / 1e3}
            counter = {"ph": "C", "name": f"rank {about['rank']}", "pid": base + world_size, "tid": 1}
            for at, value in zip(times.tolist(), lead.tolist(), strict=True):
                yield {**counter, "ts": (at - since) / 1e3, "args": {"lead": value}}
        base += world_size + 1


def _titles(pid: int, order: int, title: str, threads: Mapping[int, str]) -> Iterator[dict[str, Any]]:
    common = {"ph": "M", "pid": pid, "ts": 0}
    yield {**common, "tid": 1, "name": "process_name", "args": {"name": title}}
    yield {**common, "tid": 1, "name": "process_sort_index", "args": {"sort_index": order}}
    for tid, name in threads.items():
        yield {**common, "tid": tid, "name": "thread_name", "args": {"name": name}}


def _slices(trace: RankTrace, ranks: Sequence[RankTrace], base: int) -> Iterator[dict[str, Any]]:
    """A rank's slices, and an arrow to each wait from the post that ended it; ts in nanoseconds."""
    kinds, slots, pid = trace.about["kinds"], trace.about["lag"] + 1, base + trace.about["rank"]
    rows, lasts, posted = trace.waits(ranks)
    began: dict[int, int] = {}  # iteration -> its first begin or post
    ended: dict[int, int] = {}  # iteration -> its release, else its last wait, else its post
    for kind, iteration, start, end in rows.tolist():
        if kinds[kind] in ("begin", "post"):
            began.setdefault(iteration, start)
        if kinds[kind] in ("post", "wait", "release"):
            ended[iteration] = end

    def piece(name: str, iteration: int, start: int, end: int, tid: int = 1, **more: Any) -> dict[str, Any]:
        span = {"ph": "X", "pid": pid, "tid": tid, "ts": start, "dur": (end - start) / 1e3}
        return {**span, "name": f"{name} {iteration}", "args": {"iteration": iteration, **more}}

    ends = [*list(began.values())[1:], int(rows[:, _END].max(initial=0))]
    for (iteration, start), end in zip(began.items(), ends, strict=bool(began)):
        yield piece("iteration", iteration, start, end)
    for (kind, iteration, start, end), last, at in zip(rows.tolist(), lasts.tolist(), posted.tolist(), strict=True):
        name = kinds[kind]
        if name == "post":
            yield piece("in flight", iteration, start, ended[iteration], 2 + iteration % slots)
        if last >= 0:
            blamed = ranks[last].about["rank"]
            yield piece(name, iteration, start, end, last=f"rank {blamed}")
            arrow = {"name": "last", "cat": "last", "id": f"{pid}.{start}", "tid": 1}
            if at < end - 1:
                yield {**arrow, "ph": "s", "pid": base + blamed, "ts": at + 1}
                yield {**arrow, "ph": "f", "bp": "e", "pid": pid, "ts": end - 1}
        elif name != "release":
            yield piece(name, iteration, start, end)
