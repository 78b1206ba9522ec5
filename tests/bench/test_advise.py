"""What a lag would give, from timings: files and folders read, good and bad, and the advice."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bench.advise import advise, choices, remarks
from bench.timings import Timings, TimingsError, from_csv, from_trace
from blsrdma.errors import BlsrdmaError
from blsrdma.lag import max_plus
from blsrdma.windows import WindowGeometry, windows_needed
from dlrm import delays
from tests.bench.test_commands import bench
from tests.test_trace import write

LAGS = [0, 1, 2, 4, 8, 16]
PLENTY = 1 << 40


def csv_of(path: Path, busy: NDArray[np.float64], first: int = 0) -> Path:
    lines = [
        f"{rank},{first + i},{seconds!r}" for rank, row in enumerate(busy.tolist()) for i, seconds in enumerate(row)
    ]
    path.write_text("rank,iteration,seconds\n" + "\n".join(lines[::-1]) + "\n")
    return path


def test_csv_in_any_order_of_lines_and_columns(tmp_path: Path) -> None:
    busy = np.random.default_rng(0).random((3, 7))
    assert from_csv(csv_of(tmp_path / "t.csv", busy, first=100)).busy.tolist() == busy.tolist()
    (tmp_path / "u.csv").write_text("\ufeffSeconds, host,Iteration,RANK\n0.5,a,4,1\n\n1e-3,b,4,0\n", encoding="utf-8")
    assert from_csv(tmp_path / "u.csv").busy.tolist() == [[0.001], [0.5]]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1: no column 'rank'"),
        ("rank,iteration,ms\n0,0,1\n", "line 1: no column 'seconds'"),
        ("rank,iteration,seconds\n", "no timings"),
        ("rank,iteration,seconds\n0,0\n", "line 2: 2 fields, the header has 3"),
        ("rank,iteration,seconds\n0,0,1\n0,x,1\n", "line 3: iteration is 'x'"),
        ("rank,iteration,seconds\n-1,0,1\n", "line 2: rank is '-1'"),
        ("rank,iteration,seconds\n0,0,fast\n", "line 2: seconds is 'fast'"),
        ("rank,iteration,seconds\n0,0,nan\n", "line 2: seconds is 'nan'"),
        ("rank,iteration,seconds\n0,0,inf\n", "line 2: seconds is 'inf'"),
        ("rank,iteration,seconds\n0,0,-1e-3\n", "line 2: seconds is '-1e-3'"),
        ("rank,iteration,seconds\n0,0,1\n0,0,1\n", "line 3: rank 0 has iteration 0 already"),
        ("rank,iteration,seconds\n0,0,1\n0,1,1\n1,0,1\n", "rank 1 has no iteration 1"),
        ("rank,iteration,seconds\n0,0,1\n2,0,1\n", "rank 1 has no iteration 0"),
        ("rank,iteration,seconds\n0,0,1\n0,999999999999999999,1\n", "rank 0 has no iteration 1;"),  # at once
        ("rank,iteration,seconds\n999999999999999999,0,1\n", "rank 0 has no iteration 0"),
    ],
)
def test_a_bad_csv_is_refused_with_its_line(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(TimingsError, match=re.escape(str(path)) + ".*" + re.escape(says)):
        from_csv(path)


def test_what_is_no_csv(tmp_path: Path) -> None:
    with pytest.raises(TimingsError, match="No such file"):
        from_csv(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"rank,iteration,seconds\n\xff\xfe,0,0\n")
    with pytest.raises(TimingsError, match="not a CSV file"):
        from_csv(tmp_path / "b.csv")


def test_a_trace_without_what_was_waited_for(tmp_path: Path) -> None:
    # Lag 0. Rank 0 posts at 1 ms of each 10, rank 1 at 7; rank 0 sees that a millisecond later.
    for rank, at in enumerate((1, 7)):
        write(tmp_path, rank, lag=0, events=[
            event for i in range(5) for event in (
                ("begin", i, 10 * i, 10 * i), ("post", i, 10 * i + at, 10 * i + at),
                ("wait", i, 10 * i + at, 10 * i + (8 if rank == 0 else 7)),
            )
        ])  # fmt: skip
    found = from_trace(tmp_path)
    np.testing.assert_allclose(found.busy, [[3e-3] * 4, [10e-3] * 4])  # 7 of 10 ms waited
    assert found.delivery == pytest.approx(1e-3)
    assert (found.lag, found.measured) == (0, pytest.approx(10e-3))


def test_a_call_inside_another_is_not_counted_twice(tmp_path: Path) -> None:
    for rank in range(2):
        late = 6 * rank
        write(tmp_path, rank, lag=0, events=[
            event for i in range(4) for event in (
                ("post", i, 10 * i + late, 10 * i + late), ("wait", i, 10 * i + 2 + late // 2, 10 * i + 7 + late // 2),
                ("wait", i, 10 * i + 1 + late // 2, 10 * i + 8 + late // 2),
            )
        ])  # fmt: skip
    np.testing.assert_allclose(from_trace(tmp_path).busy[0], [3e-3] * 3)  # blocked from 1 to 8


def test_a_bad_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BlsrdmaError, match="no trace-"):
        from_trace(tmp_path)
    write(tmp_path, 0, [("post", i, i, i) for i in range(5)], name="a")
    with pytest.raises(TimingsError, match="rank 1 of 2 is missing"):
        from_trace(tmp_path)
    write(tmp_path, 1, [("post", 0, 1, 2)], name="a")
    with pytest.raises(TimingsError, match="fewer than two"):
        from_trace(tmp_path)
    write(tmp_path, 0, [], name="b", world_size=1)
    with pytest.raises(TimingsError, match="exchanges a, b"):
        from_trace(tmp_path)
    with pytest.raises(TimingsError, match="no exchange 'c'"):
        from_trace(tmp_path, "c")
    with pytest.raises(TimingsError, match="fewer than two"):
        from_trace(tmp_path, "b")


def job(text: str, iterations: int = 1000) -> Timings:
    return Timings("here", delays.parse(text, 1).table(4, iterations) + 1e-4)


def test_choices_are_the_model_and_the_memory_of_the_windows() -> None:
    timings = job("exp:p=0.1,mean=2ms")
    found = choices(timings, [4, 4, 1], 65536, cost=1e-4)
    assert [choice.lag for choice in found] == [0, 1, 4, None]
    for choice in found[:-1]:
        assert choice.lag is not None
        assert choice.seconds == max_plus(timings.busy, choice.lag, 1e-4)[:, -1].max() / 1000
        assert choice.memory_bytes == WindowGeometry(4, windows_needed(choice.lag), 65536).arena_bytes
        assert choice.gain == found[0].seconds / choice.seconds
    assert found[-1].seconds == pytest.approx((timings.busy + 1e-4).mean(axis=1).max())


@pytest.mark.parametrize(
    ("delay", "lag", "says"),
    [
        ("exp:p=0.1,mean=2ms", 16, "times the speed of lag 0"),
        ("rotate:every=2,time=3ms", 8, "times the speed of lag 0"),
        ("slow:time=1ms", 0, "rank 3 is slow all the time"),
        ("none", 0, "balanced"),
        ("rotate:every=200,time=20ms", None, "couples no loops"),
    ],
)
def test_advice(delay: str, lag: int | None, says: str) -> None:
    timings = job(delay)
    advice = advise(timings, choices(timings, LAGS, 65536), PLENTY)
    assert advice.lag == lag
    assert says in advice.reason


def test_no_advice_over_the_memory_or_beyond_what_a_short_run_shows() -> None:
    timings = job("exp:p=0.1,mean=2ms")
    found = choices(timings, LAGS, 65536)
    limit = found[3].memory_bytes  # of lag 4
    assert advise(timings, found, limit).lag == 4
    assert "memory limit" in remarks(timings, found, limit)[-1]
    short = job("exp:p=0.1,mean=2ms", 100)
    found = choices(short, LAGS, 65536)
    assert advise(short, found, PLENTY).lag == 4
    assert any("lags above 4" in line for line in remarks(short, found, PLENTY))


def test_the_command(tmp_path: Path) -> None:
    path = csv_of(tmp_path / "t.csv", job("exp:p=0.1,mean=2ms", 400).busy)
    done = bench("advise", "--csv", str(path), "--lags", "2", "8", "--json", str(tmp_path / "a.json"))
    assert done.returncode == 0, done.stderr
    assert "uncoupled" in done.stdout
    assert "Take lag 8: " in done.stdout
    found = json.loads((tmp_path / "a.json").read_text())
    assert [choice["lag"] for choice in found["choices"]] == [0, 2, 8, None]
    assert found["advice"]["lag"] == 8
    path.write_text("rank,iteration,seconds\n0,0,?\n")
    done = bench("advise", "--csv", str(path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == f"{path}, line 2: seconds is '?', not a number >= 0"
