"""What `python -m blsrdma check` found out about ranks and the links between them, and what to think of it: pure.

A link is an ordered pair of ranks. Links are compared with those of their own kind, within a host or between hosts,
and one that is FACTOR times worse than the better quarter of them is pointed out: as its rank's or its host's fault
where most of that one's links are bad, else as its own. Errors are what makes an exchange fail or be wrong; notes what
makes it slow.
"""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from blsrdma.settings import format_size

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

FACTOR = 3.0  # how many times worse than the better quarter of its kind a link has to be
SLACK_US = 20.0  # and at least so much slower, in latency: less is noise of any machine
SHOWN = 16  # ranks up to which whole matrices are printed

Verdict: TypeAlias = Literal["error", "note"]


@dataclass(frozen=True)
class Facts:
    """What one rank says of itself and of its links; of the other ranks by their number."""

    rank: int
    host: str
    place: str  # equal iff two ranks share a host and its process numbers
    cores: int
    ucx: str
    environment: Mapping[str, str] = field(default_factory=dict)  # UCX_* and BLSRDMA_*
    devices: Sequence[str] = ()  # RDMA ports of the host that are up
    locked: int = -1  # bytes that may be locked; -1: no limit
    path: Mapping[int, str] = field(default_factory=dict)  # direct or put
    transport: Mapping[int, str] = field(default_factory=dict)
    torn: Sequence[str] = ()  # messages that were there before all their bytes
    verified: int = 0  # messages that were looked at
    latency: Mapping[int, float] = field(default_factory=dict)  # microseconds per iteration of the pair alone, 8 bytes
    bandwidth: Mapping[int, float] = field(default_factory=dict)  # bytes per second to the other
    failed: Mapping[int, str] = field(default_factory=dict)  # links that could not be measured, and why
    error: str = ""  # why this rank could not do more

    @staticmethod
    def of(values: Mapping[str, Any]) -> Facts:
        """From JSON, whose keys are text."""
        by_rank = ("path", "transport", "latency", "bandwidth", "failed")
        return Facts(**{**values, **{name: {int(r): v for r, v in values[name].items()} for name in by_rank}})


@dataclass(frozen=True)
class Finding:
    """Something wrong, what or whom it concerns, and the likely cause or cure."""

    verdict: Verdict
    where: str
    text: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.verdict}: {self.where}: {self.text}" + (f"\n    -> {self.advice}" if self.advice else "")


def findings(ranks: Sequence[Facts | None]) -> list[Finding]:
    """Everything wrong, errors first. None stands for a rank that has not reported."""
    there = [each for each in ranks if each is not None]
    found = [*_missing(ranks), *_failures(there), *_nodes(there), *_paths(there), *_slow(there)]
    return sorted(found, key=lambda each: each.verdict != "error")


def status(found: Sequence[Finding], strict: bool = False) -> int:
    """The exit status: 1 an exchange fails or is wrong; 3 it works, but something is slow or odd, if `strict`; else
    0."""
    return 1 if any(each.verdict == "error" for each in found) else 3 if found and strict else 0


# --- errors


def _missing(ranks: Sequence[Facts | None]) -> Iterator[Finding]:
    for rank, each in enumerate(ranks):
        if each is None:
            yield Finding("error", f"rank {rank}", "has not reported", "look at its own output, and whether it lives")
        elif each.error:
            advice = "look at `python -m blsrdma info` there"
            if "have not come" in each.error or "has not answered" in each.error:
                advice = "those ranks died or were not started, or cannot reach the store: MASTER_ADDR, a firewall"
            yield Finding("error", f"rank {rank} on {each.host}", each.error, advice)


def _failures(there: Sequence[Facts]) -> Iterator[Finding]:
    for each in there:
        for text in each.torn:
            advice = "writes overtake each other: UCX_IB_PCI_RELAXED_ORDERING must be n; look for adaptive routing"
            yield Finding("error", f"rank {each.rank} on {each.host}", text, advice)
        for other, text in each.failed.items():
            if other > each.rank or each.rank not in {f.rank: f for f in there}.get(other, each).failed:
                yield Finding("error", f"ranks {each.rank} and {other}", text)


# --- oddities


def _nodes(there: Sequence[Facts]) -> Iterator[Finding]:
    yield from _odd(there, "UCX", [each.ucx for each in there])
    yield from _odd(there, "memlock", [_locked(each.locked) for each in there])
    for name in sorted({name for each in there for name in each.environment} - {"UCX_NET_DEVICES"}):  # a NIC each
        yield from _odd(there, name, [each.environment.get(name, "not set") for each in there])
    by_place: dict[str, list[Facts]] = {}
    for each in there:
        by_place.setdefault(each.place, []).append(each)
    for group in by_place.values():
        cores = max(each.cores for each in group)
        if len(group) > cores:
            text = f"{len(group)} ranks share {cores} cores"
            yield Finding(
                "note", group[0].host, text, "they wait for each other's time slices: fewer ranks, or more cores"
            )


def _odd(there: Sequence[Facts], what: str, values: Sequence[str]) -> Iterator[Finding]:
    """Ranks whose value is not that of most."""
    usual = Counter(values).most_common(1)[0][0] if values else ""
    for value in dict.fromkeys(values):
        if value != usual:
            others = [each for each, own in zip(there, values, strict=True) if own == value]
            yield Finding("note", _ranks(others), f"{what} is {value}, elsewhere {usual}", "make them the same")


def _paths(there: Sequence[Facts]) -> Iterator[Finding]:
    by_rank = {each.rank: each for each in there}
    within: list[tuple[int, int]] = []
    kinds: dict[tuple[int, int], str] = {}
    for each in there:
        for other, path in each.path.items():
            peer = by_rank.get(other)
            if peer is None or peer.rank <= each.rank:
                continue
            if path == "put" and peer.place == each.place and each.environment.get("BLSRDMA_DIRECT") != "0":
                within.append((each.rank, other))
            elif path == "put" and peer.place != each.place:
                kinds[each.rank, other] = transports(each.transport.get(other, ""))
    if within:
        advice = "no shared memory between them: let UCX_TLS contain sm; containers need one IPC namespace or /dev/shm"
        yield Finding("note", _pairs(within), "on one host, but puts instead of direct stores", advice)
    counts = Counter(kinds.values())
    usual = max(counts, key=lambda kind: (kind != "tcp", counts[kind]), default="")  # who has better does not want TCP
    for kind in sorted(counts):
        if kind != usual:
            pairs = [pair for pair, own in kinds.items() if own == kind]
            hosts = Counter(by_rank[rank].host for pair in pairs for rank in pair)
            advice = f"others go by {usual}: look at {hosts.most_common(1)[0][0]}: is its port up, "
            yield Finding("note", _pairs(pairs), f"go by {kind}", advice + "are UCX_NET_DEVICES and UCX_TLS right?")
    if usual == "tcp" and (up := {port for each in there for port in each.devices}):
        advice = "UCX without verbs, or UCX_TLS or UCX_NET_DEVICES exclude it: see docs/clusters.md"
        yield Finding("note", "all hosts", f"TCP is used although RDMA ports are up ({', '.join(sorted(up))})", advice)


# --- slow links


def _slow(there: Sequence[Facts]) -> Iterator[Finding]:
    by_rank = {each.rank: each for each in there}
    for inside in (True, False):
        kind = "within hosts" if inside else "between hosts"
        rows = {"latency": [each.latency for each in there], "bandwidth": [each.bandwidth for each in there]}
        for what, row in rows.items():
            measured = {
                (each.rank, other): value
                for each, own in zip(there, row, strict=True)
                for other, value in own.items()
                if other in by_rank and (by_rank[other].place == each.place) == inside
            }
            if len(measured) < 3:  # two directions of one pair: nothing to compare with
                continue
            good = _good(what, list(measured.values()))
            slow = {pair for pair, value in measured.items() if _worse(what, value, good)}
            yield from _blame(slow, measured, by_rank, f"{what} {kind}", what, good)


def _good(what: str, values: Sequence[float]) -> float:
    """What a quarter of all reach. Not the median: of four hosts' links one bad host makes half of them bad."""
    return sorted(values, reverse=what == "bandwidth")[(len(values) - 1) // 4]


def _worse(what: str, value: float, good: float) -> bool:
    if what == "latency":
        return value > FACTOR * good and value > good + SLACK_US
    return value * FACTOR < good


def _blame(
    slow: set[tuple[int, int]], measured: Mapping[tuple[int, int], float], by_rank: Mapping[int, Facts], where: str,
    what: str, good: float,
) -> Iterator[Finding]:  # fmt: skip
    """A finding for each host or rank most of whose links are slow, then for each slow link that is left."""
    inside = where.endswith("within hosts")

    def tell(whom: str, pairs: set[tuple[int, int]], advice: str) -> Finding:
        value = statistics.median(measured[pair] for pair in pairs)
        return Finding(
            "note", whom, f"{where} is {_unit(what, value)}, a quarter of all reach {_unit(what, good)}", advice
        )

    suspects: dict[str, set[tuple[int, int]]] = {}  # and their links
    for pair in measured:
        ends = [by_rank[rank] for rank in pair]
        for whom in dict.fromkeys([*(f"host {each.host}" for each in ends), *(_ranks([each]) for each in ends)]):
            suspects.setdefault(whom, set()).add(pair)
    for whom, links in sorted(
        suspects.items(), key=lambda each: (-len(each[1] & slow), not each[0].startswith("host"))
    ):
        ours = links & slow
        # Most of its links, and not simply most of all there are.
        if len(ours) > 1 and len(ours) * 4 >= len(links) * 3 and len(links) < len(measured):
            advice = (
                "its network port (rate, cable, errors), the PCIe slot and NUMA node of the device; other work there"
            )
            yield tell(whom, ours, "other work there, or fewer cores than ranks" if inside else advice)
            slow = slow - ours
    for pair in sorted(slow):
        from_host, to_host = (by_rank[rank].host for rank in pair)
        whom = f"rank {pair[0]} -> rank {pair[1]}" + (f" on {to_host}" if inside else f" ({from_host} -> {to_host})")
        advice = "repeat; if it stays: the path between the two, a switch port, routing, the rail"
        yield tell(whom, {pair}, "other work there while it was measured? repeat" if inside else advice)


# --- text


def report(ranks: Sequence[Facts | None], message_bytes: int) -> Iterator[str]:
    """Lines of text: who is where, how each pair is wired, the matrices."""
    there = [each for each in ranks if each is not None]
    for host in dict.fromkeys(each.host for each in there):
        group = [each for each in there if each.host == host]
        numbers = _ranks(group).partition(" on ")[0]
        yield f"{host}: {numbers}; {group[0].cores} cores; UCX {group[0].ucx}"
    yield from topology(there)
    verified = sum(each.verified for each in there)
    torn = sum(len(each.torn) for each in there)
    yield f"order: {verified} messages looked at the moment they were announced, {torn or 'none'} of them incomplete"
    title = f"bandwidth, GB/s, rank of the row to rank of the column, messages of {format_size(message_bytes)}"
    for name, values, scale, digits in (
        ("latency, us per iteration of a pair, 8 bytes each way", [each.latency for each in there], 1.0, 1),
        (title, [each.bandwidth for each in there], 1e9, 2),
    ):
        every = [value / scale for row in values for value in row.values()]
        if not every:
            continue
        median = statistics.median(every)
        yield f"{name}: {min(every):.{digits}f} to {max(every):.{digits}f}, median {median:.{digits}f}"
        if len(ranks) <= SHOWN:
            yield from _matrix([each.rank for each in there], values, scale, digits)


def topology(there: Sequence[Facts]) -> Iterator[str]:
    """How many pairs take which path, within hosts and between them."""
    by_rank = {each.rank: each for each in there}
    counted: Counter[tuple[bool, str]] = Counter()
    for each in there:
        for other, path in each.path.items():
            if other > each.rank:
                inside = other in by_rank and by_rank[other].place == each.place
                shown = "direct stores" if path == "direct" else f"puts ({each.transport.get(other, 'unknown')})"
                counted[inside, shown] += 1
    for (inside, shown), count in counted.most_common():
        where = "within hosts" if inside else "between hosts"
        yield f"{where}: {count} pair{'s' * (count != 1)} by {shown}"


def _matrix(names: Sequence[int], rows: Sequence[Mapping[int, float]], scale: float, digits: int) -> Iterator[str]:
    yield "      " + "".join(f"{name:>9}" for name in names)
    for name, row in zip(names, rows, strict=True):
        cells = (f"{row[other] / scale:.{digits}f}" if other in row else "-" for other in names)
        yield f"{name:>6}" + "".join(f"{cell:>9}" for cell in cells)


def transports(names: str) -> str:
    """'rc_mlx5/mlx5_0:1,tcp/eth0' as 'rc_mlx5,tcp': the same on hosts whose devices have other names."""
    return ",".join(dict.fromkeys(name.partition("/")[0] for name in names.split(",")))


def _unit(what: str, value: float) -> str:
    return f"{value:.1f} us" if what == "latency" else f"{value / 1e9:.2f} GB/s"


def _locked(count: int) -> str:
    return "unlimited" if count < 0 else format_size(count)


def _ranks(group: Sequence[Facts]) -> str:
    numbers = ", ".join(str(each.rank) for each in group[:SHOWN]) + ", ..." * (len(group) > SHOWN)
    hosts = ", ".join(dict.fromkeys(each.host for each in group))
    return f"rank{'s' * (len(group) > 1)} {numbers} on {hosts}"


def _pairs(pairs: Sequence[tuple[int, int]]) -> str:
    shown = ", ".join(f"{a}-{b}" for a, b in pairs[:6]) + ", ..." * (len(pairs) > 6)
    return f"pair{'s' * (len(pairs) > 1)} {shown}"
