"""The commands, as a user runs them, in their smallest form."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import parse
from bench.delay_report import over_model
from bench.launchers import Interpreters, Unavailable
from bench.limits import perftest
from bench.results import Results
from bench.stress_rank import phases, sizes
from dlrm.data.criteo import CriteoFile

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-m", "bench", *arguments], capture_output=True, text=True, timeout=timeout, cwd=ROOT,
        env=environment, check=False,
    )  # fmt: skip


def small(path: Path, *systems: str, more: tuple[str, ...] = ()) -> Results:
    done = bench(
        "alltoallv", "--ranks", "2", "--bytes", "1K", "zipf:4K", "--lags", "0", "2", "--repeat", "2", "--seconds",
        "0.01", "--json", str(path), "--systems", *systems, *more,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    results = Results.load(path)
    assert results.systems() == list(systems), results.skipped
    assert len(results.measurements) == 4 * len(systems)
    for m in results.measurements:
        assert len(m.samples) == 2
        assert min(map(min, m.samples)) > 0
        assert m.checked_bytes > 0
    return results


def test_large(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    few = ["--bytes", "5000", "--transports", "puts", "--repeat", "2", "--seconds", "0.01"]
    done = bench("large", *few, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    (measured,) = json.loads(path.read_text())["measurements"]
    assert measured["large"] == ["get"]
    assert all(len(samples) == 2 and min(samples) > 0 for samples in measured["samples"].values())


def test_alltoallv_of_bls_and_gloo(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    results = small(
        path,
        "bls",
        "bls-copy",
        "bls-torch",
        "bls-torch-nb",
        "gloo",
        "gloo-nb",
        more=("--self", "view", "--plot", str(tmp_path / "p.png")),
    )
    assert results.environment["cores"] >= 1
    assert "torch" in results.versions["gloo"]
    assert results.measurements[0].facts[0]["paths"] == ["direct (mapped)"]
    assert (tmp_path / "p.png").exists()
    again = bench("alltoallv", *"--ranks 2 --bytes 1K zipf:4K --lags 0 2 --repeat 2 --seconds 0.01".split(),
                  "--systems", *results.systems(), "--json", str(path), "--resume", "--markdown")  # fmt: skip
    assert again.returncode == 0, again.stderr
    assert "| ranks | bytes per peer | lag |" in again.stdout
    assert Results.load(path).measurements == results.measurements  # nothing was measured again
    assert bench("table", str(path)).returncode == 0


def test_alltoallv_where_all_copy_to_themselves_and_read(tmp_path: Path) -> None:
    small(tmp_path / "r.json", "bls", "bls-copy", "gloo", more=("--self", "copy", "--read", "--transport", "puts"))


@pytest.mark.parametrize("kind", ["mpich", "openmpi"])
def test_alltoallv_of_mpi(kind: str, tmp_path: Path) -> None:
    try:
        Interpreters().find(kind)
    except Unavailable as reason:
        pytest.skip(str(reason))
    small(tmp_path / "r.json", kind, f"{kind}-nb")


@pytest.mark.slow
def test_lookups(tmp_path: Path) -> None:
    path = tmp_path / "l.json"
    arguments = "--ranks 2 --tables 3 --rows 500 --samples 16 --iterations 12 --repeat 1 --outage 0.1".split()
    done = bench("lookups", *arguments, "--json", str(path), "--plot", str(tmp_path / "l.png"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no synchronisation" in done.stdout
    results = {(each["case"], each["system"]): each["runs"] for each in json.loads(path.read_text())["results"]}
    assert results["exponential", "put"][0]["checked"] > 0
    assert results["undelayed", "get"][0]["paths"] == ["read", "self"]
    assert results["owner stopped", "get"][0]["per_second"] > 0
    assert (tmp_path / "l.png").exists()


@pytest.mark.slow
def test_dlrm(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    done = bench("dlrm", "--quick", "--rows", "500", "--batch", "64", "--lookups", "2", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DLRM inference, 2 rows in each bag" in done.stdout
    (measured,) = json.loads(path.read_text())["lookups"].values()
    assert len(measured) == 6 + 2
    assert all(len(one["seconds"]) == 3 for one in measured)
    for one in measured[3:]:
        assert len(one["shares"]) == 2
        assert 0 < one["worked"][0] < 1


@pytest.mark.slow
def test_quiet(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    done = bench("quiet", "--silence", "0.2", "--repeat", "1", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert set(json.loads(path.read_text())["runs"]) == {"always busy", "rank 1 silent"}


def test_rows_that_are_parsed_are_those_that_were_written(tmp_path: Path) -> None:
    parse.write(tmp_path / "rows", 1234)
    batches = list(CriteoFile(tmp_path / "rows", (2**32,) * 26).batches(100, 0))
    assert sum(batch.size for batch in batches) == 1234
    gone = float(torch.cat([indices for batch in batches for indices in batch.indices]).eq(0).float().mean())
    assert gone == pytest.approx(parse.MISSING, abs=0.02)


def test_stress(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    done = bench("stress", "--iterations", "400", "--ranks", "3", "--seed", "1", "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "everything was right" in done.stdout
    facts = json.loads(path.read_text())
    assert [tally["iterations"] for tally in facts["by_rank"]] == [400] * 3
    assert facts["by_rank"][0]["exchanges"] == len(list(phases(400, 1)))


def test_stress_plan_is_the_same_for_the_same_seed() -> None:
    plans = [list(phases(5000, seed)) for seed in (3, 3, 4)]
    assert plans[0] == plans[1] != plans[2]
    assert sum(phase.iterations for phase in plans[0]) == 5000
    assert len({phase.lag for phase in plans[0]}) > 3
    phase = plans[0][0]
    drawn = [list(sizes(phase, 3, seed, max_windows=3)) for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == phase.iterations
    every = {size for table in drawn[0] for row in table for size in row}
    assert {0, phase.window_bytes, phase.window_bytes + 1, phase.window_bytes * 3} <= every
    assert max(every) == 3 * phase.window_bytes


def test_limits(tmp_path: Path) -> None:
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("no C compiler")
    done = bench("limits", "--quick", "--parts", "native", "--json", str(tmp_path / "l.json"))
    assert done.returncode == 0, done.stderr
    limits = {(limit["name"], limit["bytes"]): limit["summary"]["low"] for limit in json.loads(
        (tmp_path / "l.json").read_text())["limits"]}  # fmt: skip
    assert 10 < limits["memcpy, one thread", 4096] < 100_000
    assert 10 < limits["flag ping-pong, one core, yielding", 0] < 10_000_000
    assert limits["TCP over loopback, round trip", 8] > 1000


def test_ucx_perftest() -> None:
    try:
        found = perftest.put("ucp_put_lat", 8, "posix,self", 0.02, runs=2)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert len(found) == 2
    assert 5 < min(found) < 1_000_000


def test_help_teaches() -> None:
    assert "start here" in bench("--help").stdout
    assert "openmpi-nb" in bench("alltoallv", "--help").stdout
    refused = bench("alltoallv", "--bytes", "much")
    assert refused.returncode == 2
    assert "'much'" in refused.stderr


def test_delays(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    arguments = "--ranks 2 --bytes 1K --lags 0 2 --delay slow:time=2ms rotate:every=3,time=5ms --systems bls".split()
    effort = "--repeat 2 --iterations 20 --seconds 0.01".split()
    done = bench("delays", *arguments, *effort, "--json", str(path), "--plot", str(tmp_path / "d.png"))
    assert done.returncode == 0, done.stdout + done.stderr
    results = Results.load(path)
    assert [(case.delay, case.lag) for case in results.cases()] == [
        (plan, lag) for plan in ("none", "slow:time=2ms", "rotate:every=3,time=5ms") for lag in (0, 2)
    ]
    for m in results.measurements:
        assert len(m.samples) == 2
        assert m.checked_bytes > 0
    slow = results.of(results.cases()[2])["bls"]
    slept = slow.slept(1)
    assert slept.shape == (2, 20)
    assert (slept[0] == 0).all()
    assert slept[1].min() >= 2e6  # really slept
    for m in results.measurements[2:]:  # no rank can be through before its own sleeps are
        assert all(s[0] * 20 >= m.slept(k).sum(axis=1).max() for k, s in enumerate(m.samples))
        assert over_model(m, cost=0.0) >= 1  # nor before the model that costs nothing
    assert "2 ranks, 1 KiB to each peer: ms per iteration" in done.stdout
    assert (tmp_path / "d.png").exists()
