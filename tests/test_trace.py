"""The trace: what is recorded, that it is bounded, and that the merged timeline shows the lag as it was."""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blsrdma import Exchange
from blsrdma.__main__ import main
from blsrdma.errors import BlsrdmaError, PeerTimeout, SettingsError
from blsrdma.trace import Trace, chrome, leads, load
from tests.ranks import run_ranks

MS = 1_000_000


def write(
    folder: Path, rank: int, events: list[tuple[str, int, int, int]], *, world_size: int = 2, lag: int = 2,
    wall_ns: int = 0, clock: str = "here", name: str = "exchange", dropped: int = 0,
) -> None:  # fmt: skip
    """A rank's file with `events`: kind, iteration, start, end in milliseconds."""
    kinds = sorted({event[0] for event in events})
    rows = [[kinds.index(kind), iteration, start * MS, end * MS] for kind, iteration, start, end in events]
    content = {
        "version": 1, "name": name, "rank": rank, "world_size": world_size, "lag": lag, "host": "h", "pid": 100 + rank,
        "clock": clock, "wall_ns": wall_ns, "dropped": dropped, "kinds": kinds, "events": rows,
    }  # fmt: skip
    (folder / f"trace-{name}-rank{rank}.json").write_text(json.dumps(content))


def steady(period: int, iterations: int) -> list[tuple[str, int, int, int]]:
    """A rank that begins i at `period * i` and posts it half a period later."""
    events = []
    for i in range(iterations):
        events += [
            ("begin", i, period * i, period * i),
            ("post", i, period * i + period // 2, period * i + period // 2),
        ]
    return events


def merged(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    assert main(["trace", str(folder), *arguments]) == 0
    found: list[dict[str, Any]] = json.loads((folder / "trace.json").read_text())["traceEvents"]
    return found


# --- the recorder


def test_recorder_keeps_what_happened(tmp_path: Path) -> None:
    trace = Trace(tmp_path, "a/b", 1, 2, lag=3)
    before = time.monotonic_ns()
    trace.span("begin", 0, before)
    trace.span("post", 0, time.monotonic_ns())
    trace.write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trace-a%2Fb-rank1.json"]
    content = json.loads(trace.path.read_text())
    assert (content["name"], content["rank"], content["world_size"], content["lag"]) == ("a/b", 1, 2, 3)
    assert [content["kinds"][event[0]] for event in content["events"]] == ["begin", "post"]
    (_, iteration, start, end), post = content["events"]
    assert iteration == 0 and start == before <= end <= post[2] <= post[3] <= time.monotonic_ns()
    assert abs(content["wall_ns"] + end - time.time_ns()) < 10e9


def test_recorder_is_bounded_and_says_what_it_dropped(tmp_path: Path) -> None:
    trace = Trace(tmp_path, "x", 0, 1, lag=0, capacity=10)
    for i in range(25):
        trace.span("post", i, 1)
    trace.write()
    content = json.loads(trace.path.read_text())
    assert [event[1] for event in content["events"]] == list(range(15, 25))
    assert content["dropped"] == 15


def test_recorder_takes_memory_as_it_fills(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident()
    traces = [Trace(tmp_path, str(n), 0, 1, lag=0) for n in range(8)]
    assert resident() - before < 32 << 20 < sum(trace._capacity * 32 for trace in traces)


def test_an_earlier_runs_file_is_removed(tmp_path: Path) -> None:
    Trace(tmp_path, "x", 0, 1, lag=0).write()
    Trace(tmp_path, "x", 0, 1, lag=0)
    with pytest.raises(BlsrdmaError, match="no trace-"):
        load(tmp_path)


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="cannot write there"):
        Trace(tmp_path / "file" / "below", "x", 0, 1, lag=0)


# --- the merge


def test_lead_is_what_was_done(tmp_path: Path) -> None:
    # Rank 0 takes 2 ms per iteration, rank 1 takes 4, with a bound that they do not reach: at any time t rank 0 has
    # begun t // 2 and rank 1 has posted (t + 2) // 4.
    write(tmp_path, 0, steady(2, 10), lag=8)
    write(tmp_path, 1, steady(4, 10), lag=8)
    first, second = leads(load(tmp_path)["exchange"])
    at = np.arange(0, 19) * MS
    value = first[1][np.searchsorted(first[0], at, "right") - 1]
    np.testing.assert_array_equal(value, [max(0, min(t // 2, 9) - (t + 2) // 4) for t in range(19)])
    assert first[1].max() == 4
    assert second[1].max() == 0


def test_hosts_are_laid_side_by_side_by_their_wall_clocks(tmp_path: Path) -> None:
    write(tmp_path, 0, steady(2, 4), clock="one", wall_ns=1_000_000 * MS)
    write(tmp_path, 1, steady(2, 4), clock="other", wall_ns=999_000 * MS)
    one, other = load(tmp_path)["exchange"]
    np.testing.assert_array_equal(one.events[:, 2] - other.events[:, 2], 1000 * MS)


def test_on_a_host_the_monotonic_clock_decides(tmp_path: Path) -> None:
    write(tmp_path, 0, steady(2, 4), wall_ns=5)
    write(tmp_path, 1, steady(2, 4), wall_ns=777)  # its wall clock was set in between
    one, other = load(tmp_path)["exchange"]
    np.testing.assert_array_equal(one.events, other.events)


def test_merged_is_a_chrome_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Rank 0 waits for iteration 0 of rank 1, which posts at 10 ms.
    write(tmp_path, 0, [("begin", 0, 0, 1), ("post", 0, 2, 3), ("wait", 0, 3, 11), ("release", 0, 12, 12),
                        ("begin", 1, 13, 13), ("post", 1, 14, 15), ("wait: TIMEOUT", 1, 15, 20)])  # fmt: skip
    write(tmp_path, 1, [("begin", 0, 0, 0), ("post", 0, 10, 12)])
    events = merged(tmp_path)
    for event in events:
        assert event["ph"] in "XMCsf" and isinstance(event["pid"], int) and isinstance(event["tid"], int)
        assert isinstance(event["name"], str) and event["ts"] >= 0
        if event["ph"] == "X":
            assert event["dur"] >= 0 and isinstance(event["args"], dict)
    slices = {(e["pid"], e["name"]): e for e in events if e["ph"] == "X"}
    assert (slices[0, "post 0"]["ts"], slices[0, "post 0"]["dur"]) == (2000, 1000)
    assert slices[0, "wait 0"]["args"]["last"] == "rank 1"
    assert "last" not in slices[0, "begin 0"]["args"]
    assert (slices[0, "iteration 0"]["ts"], slices[0, "iteration 0"]["dur"]) == (0, 13_000)
    assert (slices[0, "in flight 0"]["ts"], slices[0, "in flight 0"]["dur"]) == (2000, 10_000)
    assert (slices[0, "in flight 1"]["tid"], slices[0, "in flight 0"]["tid"]) == (3, 2)
    assert (0, "wait: TIMEOUT 1") in slices
    start, end = ([e for e in events if e["ph"] == kind] for kind in "sf")
    assert [(e["pid"], e["id"]) for e in start] == [(1, end[0]["id"])] and [e["pid"] for e in end] == [0]
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {
        "rank 0 (pid 100 on h)", "rank 1 (pid 101 on h)", "lead: iterations ahead of the slowest",
    }  # fmt: skip
    assert {e["name"] for e in events if e["ph"] == "C"} == {"rank 0", "rank 1"}
    said = capsys.readouterr().out
    assert "rank 0: 2 iterations, lead up to 0" in said and "most for rank 1 (0.008 s)" in said


def test_slices_of_a_track_are_nested(tmp_path: Path) -> None:
    write(tmp_path, 0, steady(2, 50), lag=3)
    write(tmp_path, 1, steady(3, 50), lag=3)
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in merged(tmp_path):
        if event["ph"] == "X":
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    assert len(tracks) == 2 * (1 + 4)
    for spans in tracks.values():
        open_until: list[float] = []
        for start, end in sorted(spans, key=lambda span: (span[0], -span[1])):
            while open_until and open_until[-1] <= start:
                open_until.pop()
            assert not open_until or end <= open_until[-1]
            open_until.append(end)


def test_some_iterations_alone(tmp_path: Path) -> None:
    write(tmp_path, 0, steady(2, 50))
    write(tmp_path, 1, steady(2, 50))
    found = {e["args"]["iteration"] for e in merged(tmp_path, "--iterations", "10:20") if e["ph"] == "X"}
    assert found == set(range(10, 21))


def test_lead_where_older_events_were_dropped(tmp_path: Path) -> None:
    write(tmp_path, 0, steady(2, 100)[100:], dropped=100)
    write(tmp_path, 1, steady(2, 100)[150:], dropped=150)
    for times, lead in leads(load(tmp_path)["exchange"]):
        assert times.min() >= 150 * MS and lead.max() <= 1


def test_several_exchanges_and_missing_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 0, steady(2, 5), name="a")
    write(tmp_path, 1, steady(2, 5), name="a")
    write(tmp_path, 1, steady(2, 5), name="b", world_size=3)
    pids = {e["args"]["name"]: e["pid"] for e in merged(tmp_path) if e["name"] == "process_name"}
    assert len(set(pids.values())) == len(pids) == 5
    assert pids["rank 1 of 'a' (pid 101 on h)"] == 1
    assert "no trace of ranks 0, 2" in capsys.readouterr().out


def test_files_of_an_earlier_larger_run_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, 2, steady(2, 5), world_size=3)
    time.sleep(0.02)
    for rank in range(2):
        write(tmp_path, rank, steady(2, 5))
    assert [trace.about["rank"] for trace in load(tmp_path)["exchange"]] == [0, 1]


def test_nothing_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, 0, [], world_size=1)
    assert {event["ph"] for event in merged(tmp_path)} == {"M"}
    assert "recorded nothing" in capsys.readouterr().out


def test_a_file_that_is_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "trace-x-rank0.json").write_text("[]")
    assert main(["trace", str(tmp_path)]) == 1
    assert "trace-x-rank0.json is not a rank's trace" in capsys.readouterr().err
    assert main(["trace", str(tmp_path / "nowhere")]) == 1
    assert "BLSRDMA_TRACE" in capsys.readouterr().err


# --- of a real exchange


def traced_loop(rank: int, world_size: int, store: Any, folder: str, lag: int, slow: int) -> int:
    with Exchange(store, rank, world_size, lag=lag, window_bytes=1024, trace=folder) as exchange:
        handles: deque[Any] = deque()
        for _ in range(40):
            exchange.begin()
            if len(handles) > lag:
                with handles.popleft() as received:
                    assert [int(message[0]) for message in received] == list(range(world_size))
            time.sleep(0.004 if rank == slow else 0.0005)
            handles.append(exchange.post(np.full(world_size, rank, np.int32)))
        for handle in handles:
            with handle:
                pass
        lead: int = exchange.stats()["max_lead"]
    return lead


@pytest.mark.parametrize("lag", [0, 2])
def test_trace_of_an_exchange(tmp_path: Path, lag: int, capsys: pytest.CaptureFixture[str]) -> None:
    world_size, slow = 3, 1
    noted = [result.value for result in run_ranks(traced_loop, world_size, str(tmp_path), lag, slow)]
    ranks = load(tmp_path)["exchange"]
    assert [len(rank.posts) for rank in ranks] == [40] * world_size
    shown = [int(lead.max()) for _, lead in leads(ranks)]
    # Shown is never more than was, and what was is shown, except where one was caught between a post's start and end.
    assert all(abs(was - seen) <= 1 and seen <= lag for was, seen in zip(noted, shown, strict=True))
    assert shown[0] == shown[2] == lag
    slices = [e for e in chrome({"exchange": ranks}) if e["ph"] == "X"]
    assert sum(e["name"].startswith("in flight") for e in slices) == 40 * world_size
    assert {e["args"]["last"] for e in slices if e["pid"] == 0 and "last" in e["args"]} >= {"rank 1"}
    merged(tmp_path)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"exchange 'exchange': 3 ranks, lag {lag}"
    assert "most for rank 1" in said[1] and "most for rank 1" in said[3]


def failing_loop(rank: int, world_size: int, store: Any, folder: str) -> None:
    with Exchange(store, rank, world_size, window_bytes=64, trace=folder) as exchange:
        if rank == 0:
            with pytest.raises(PeerTimeout):
                exchange.post(np.zeros(world_size)).wait(timeout=0.05)
        store.set(f"done{rank}", "")
        store.wait(["done0"])


def test_an_error_is_in_the_trace(tmp_path: Path) -> None:
    run_ranks(failing_loop, 2, str(tmp_path))
    names = [e["name"] for e in merged(tmp_path) if e["ph"] == "X"]
    assert "wait: TIMEOUT 0" in names
