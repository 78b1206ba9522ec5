"""What a check thinks of what it found: who is blamed for which slow link, what is an error and what a note."""

from __future__ import annotations

import dataclasses
import json

import pytest

from blsrdma.links import Facts, Finding, findings, report, status

RANKS, PER_HOST = 8, 2


def world(slow=(), **changes) -> list[Facts]:
    """Four hosts with two ranks each; links (from, to) in `slow` are ten times slower, in latency and bandwidth."""
    ranks = []
    for rank in range(RANKS):
        others = [q for q in range(RANKS) if q != rank]
        near = {q for q in others if q // PER_HOST == rank // PER_HOST}
        ranks.append(
            Facts(
                rank=rank,
                host=f"n{rank // PER_HOST}",
                place=f"boot{rank // PER_HOST}",
                cores=16,
                ucx="1.21.0",
                path={q: "direct" if q in near else "put" for q in others},
                transport={q: "mapped" if q in near else "rc_mlx5/mlx5_0:1,ud_mlx5/mlx5_0:1" for q in others},
                verified=100,
                latency={q: (1.0 if q in near else 4.0) * (10 if (rank, q) in slow else 1) for q in others},
                bandwidth={q: (40e9 if q in near else 12e9) / (10 if (rank, q) in slow else 1) for q in others},
            )
        )
    for rank, change in changes.items():
        number = int(rank[1:])
        ranks[number] = dataclasses.replace(ranks[number], **change)
    return ranks


def both(pairs):
    return {(a, b) for pair in pairs for a, b in (pair, pair[::-1])}


def only(found: list[Finding]) -> Finding:
    assert len(found) == 1, found
    return found[0]


def test_all_is_well() -> None:
    found = findings(world())
    assert found == []
    assert status(found, strict=True) == 0
    lines = list(report(world(), 1 << 20))
    assert "n0: ranks 0, 1; 16 cores; UCX 1.21.0" in lines
    assert "within hosts: 4 pairs by direct stores" in lines
    assert "between hosts: 24 pairs by puts (rc_mlx5/mlx5_0:1,ud_mlx5/mlx5_0:1)" in lines
    assert "order: 800 messages looked at the moment they were announced, none of them incomplete" in lines
    assert "     3      4.0      4.0      1.0        -      4.0      4.0      4.0      4.0" in lines


def test_what_travels_as_json() -> None:
    for each in world(r1={"failed": {3: "x"}, "environment": {"UCX_TLS": "all"}}):
        read = Facts.of(json.loads(json.dumps(dataclasses.asdict(each))))
        assert dataclasses.asdict(read) == dataclasses.asdict(each) | {"devices": [], "torn": []}


def test_one_slow_link() -> None:
    """Its latency (10 times, but 36 us over the median) and its bandwidth; nobody else is blamed."""
    latency, bandwidth = findings(world(slow={(2, 5)}))
    assert latency.where == bandwidth.where == "rank 2 -> rank 5 (n1 -> n2)"
    assert latency.text == "latency between hosts is 40.0 us, a quarter of all reach 4.0 us"
    assert bandwidth.text == "bandwidth between hosts is 1.20 GB/s, a quarter of all reach 12.00 GB/s"
    assert status([latency, bandwidth]) == 0
    assert status([latency, bandwidth], strict=True) == 3


def test_a_little_slower_is_no_finding() -> None:
    assert findings(world(r2={"latency": {4: 11.0}, "bandwidth": {4: 5e9}})) == []
    near = findings(world(slow=both([(0, 1)])))  # 10 us instead of 1: within the noise of any machine
    assert {each.text.partition(" is")[0] for each in near} == {"bandwidth within hosts"}


def test_a_slow_host() -> None:
    """All of its links to others: one finding for the host, none for its twelve pairs or its ranks."""
    slow = both([(a, b) for a in (2, 3) for b in range(RANKS) if b not in (2, 3)])
    found = findings(world(slow=slow))
    assert [each.where for each in found] == ["host n1", "host n1"]
    assert "its network port" in found[0].advice


def test_a_slow_rank() -> None:
    """One of two ranks of a host: its NIC or its cores, not the host's."""
    slow = both([(3, b) for b in range(RANKS) if b not in (2, 3)])
    assert {each.where for each in findings(world(slow=slow))} == {"rank 3 on n1"}


def test_a_slow_host_and_a_slow_link_elsewhere() -> None:
    slow = both([(a, b) for a in (2, 3) for b in range(RANKS) if b not in (2, 3)]) | {(4, 7)}
    assert {each.where for each in findings(world(slow=slow))} == {"host n1", "rank 4 -> rank 7 (n2 -> n3)"}


def test_another_transport() -> None:
    tcp = dict.fromkeys(range(2, RANKS), "tcp/eth0")
    ranks = world(r0={"transport": tcp}, r1={"transport": tcp})
    found = only(findings(ranks))
    assert found.text == "go by tcp"
    assert found.where == "pairs 0-2, 0-3, 0-4, 0-5, 0-6, 0-7, ..."
    assert "look at n0: is its port up" in found.advice


def test_devices_of_other_names_are_the_same_transport() -> None:
    changed = dict.fromkeys(range(2, RANKS), "rc_mlx5/mlx5_7:1,ud_mlx5/mlx5_7:1")
    assert findings(world(r0={"transport": changed})) == []


def test_tcp_although_there_is_rdma() -> None:
    tcp = dict.fromkeys(range(RANKS), "tcp/eth0")
    ranks = world(**{f"r{r}": {"transport": tcp, "devices": ["mlx5_0:1"]} for r in range(RANKS)})
    assert "TCP is used although RDMA ports are up (mlx5_0:1)" in only(findings(ranks)).text


def test_puts_within_a_host() -> None:
    paths = dict.fromkeys(range(1, RANKS), "put")
    found = only(findings(world(r0={"path": paths})))
    assert found.where == "pair 0-1"
    assert "IPC namespace" in found.advice
    assert (
        findings(world(**{f"r{r}": {"environment": {"BLSRDMA_DIRECT": "0"}, "path": paths} for r in range(RANKS)}))
        == []
    )


def test_odd_nodes() -> None:
    ranks = world(r4={"ucx": "1.19.0"}, r5={"ucx": "1.19.0", "environment": {"UCX_TLS": "tcp"}}, r6={"locked": 65536})
    said = {str(each).partition("\n")[0] for each in findings(ranks)}
    assert said == {
        "note: ranks 4, 5 on n2: UCX is 1.19.0, elsewhere 1.21.0",
        "note: rank 6 on n3: memlock is 64.0 KiB, elsewhere unlimited",
        "note: rank 5 on n2: UCX_TLS is tcp, elsewhere not set",
    }


def test_crowded() -> None:
    found = findings(world(**{f"r{rank}": {"cores": 1} for rank in range(RANKS)}))
    assert [(each.where, each.text) for each in found] == [(f"n{n}", "2 ranks share 1 cores") for n in range(4)]


@pytest.mark.parametrize(
    ("change", "where", "text"),
    [
        ({"torn": ["message 7 of rank 1"]}, "rank 2 on n1", "message 7 of rank 1"),
        ({"error": "RendezvousError: ranks 3 have not come within 60 s"}, "rank 2 on n1", "ranks 3 have not come"),
        ({"failed": {6: "PeerTimeout: x"}}, "ranks 2 and 6", "PeerTimeout"),
    ],
)
def test_errors(change, where: str, text: str) -> None:
    found = only(findings(world(r2=change)))
    assert found.verdict == "error"
    assert found.where == where
    assert text in found.text
    assert status([found]) == 1


def test_a_failed_pair_is_told_once_and_a_silent_rank_by_its_number() -> None:
    ranks: list[Facts | None] = [*world(r1={"failed": {4: "a"}}, r4={"failed": {1: "b"}})]
    assert only(findings(ranks)).where == "ranks 1 and 4"
    ranks[7] = None
    assert {each.where for each in findings(ranks)} == {"ranks 1 and 4", "rank 7"}
    assert findings(ranks)[0].verdict == "error"
    assert list(report(ranks, 8))
