"""The experiments: a part in its smallest form, as a user runs it, and what is made of numbers that are known."""

from __future__ import annotations

import argparse
import base64
import dataclasses
import json
import os
import re
import subprocess
import sys
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.cases import Case
from bench.paper import command, findings, goals, tables, where
from bench.paper.dlrm import ALONE, NONE
from bench.paper.effort import TRIAL
from bench.paper.folder import Folder, Part
from bench.paper.served import Served
from bench.paper.workloads import workloads
from bench.results import Measurement, Results

ROOT = Path(__file__).resolve().parents[2]
MS = 1_000_000


def paper(*arguments: str, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment.pop("BLSRDMA_TEST_DATA", None)
    return subprocess.run(
        [sys.executable, "-m", "bench", "paper", "--trial", *arguments], capture_output=True, text=True, cwd=ROOT,
        timeout=timeout, env=environment, check=False,
    )  # fmt: skip


def here(*arguments: str) -> int:
    """The same in this process, where nothing is measured."""
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    options = parser.parse_args(["paper", "--trial", *arguments])
    status: int = options.run(options)
    return status


def test_a_part_is_measured_once_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "out", tmp_path / "page.md"
    marks = "".join(f"<!-- bench {name} -->\n<!-- end {name} -->\n" for name in ("paper-headline", "paper"))
    page.write_text(f"before\n{marks}after\n")
    first = paper("--parts", "where", "--out", str(out), "--document", str(page))
    assert first.returncode == 0, first.stderr
    assert {path.name for path in out.iterdir()} == {"where.json", "where.npz", "figures", "report.html"}
    assert {path.name for path in (out / "figures").iterdir()} == {"where.png", "where.svg"}
    assert (tmp_path / "page" / "where.png").stat().st_size > 1000
    text = page.read_text()
    assert text.startswith("before") and text.endswith("after\n")
    assert "(page/where.png)" in text and "the simulator against 2 measured runs" in text
    html = (out / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', html)  # one file, with everything in it
    assert "Simulated: speed / lag 0, by ranks" in html
    picture = re.search(r'src="data:image/svg\+xml;base64,([^"]+)"', html)
    assert picture and base64.b64decode(picture[1]) == (out / "figures/where.svg").read_bytes()

    before = (out / "where.json").read_text()
    assert here("--parts", "where", "--out", str(out)) == 0
    assert "where: kept" in capsys.readouterr().err
    assert (out / "where.json").read_text() == before
    part = Folder(out).load("where")
    assert part is not None
    m = Results.of_values(part.values["results"]).measurements[-1]
    assert len(part.arrays["3/samples"]) == len(m.samples) == TRIAL.where.repeat
    assert part.arrays["3/slept"].shape == (TRIAL.where.repeat, 2, TRIAL.where.iterations)
    assert part.arrays["3/slept"].min() >= MS  # everybody works for 1 ms
    assert part.arrays["ranks"].shape == (2, len(where.LAGS))


@pytest.mark.slow
def test_all_parts(tmp_path: Path) -> None:
    done = paper("--out", str(tmp_path), timeout=400)
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in tmp_path.glob("*.npz")} == {"synthetic", "dlrm-balanced", "where", "exact"}
    assert {path.name for path in (tmp_path / "figures").glob("*.png")} == {
        "delays.png", "dlrm.png", "latency.png", "where.png"
    }  # fmt: skip
    parts = {name: part for name in ("synthetic", "dlrm-balanced", "where", "exact")
             if (part := Folder(tmp_path).load(name))}  # fmt: skip
    (exact,) = (goal for goal in goals.goals(parts) if goal.what.startswith("digests"))
    assert exact.reached, exact
    assert len(findings.findings(parts)) >= 5
    assert here("--report", "--out", str(tmp_path)) == 0


def test_nothing_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert here("--report", "--out", str(tmp_path)) == 1
    assert "has no part of a run" in capsys.readouterr().err


def test_a_part_is_kept_with_its_settings_only(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    assert folder.load("p") is None
    folder.save(Part("p", {"a": [1, 2]}, values={"x": 1.5}, arrays={"n": np.arange(3)}, seconds=2.0))
    kept = folder.load("p", {"a": (1, 2)})
    assert kept is not None
    assert (kept.values, kept.arrays["n"].tolist(), kept.seconds) == ({"x": 1.5}, [0, 1, 2], 2.0)
    assert folder.load("p", {"a": [1, 3]}) is None
    (tmp_path / "p.npz").write_bytes(b"PK cut short")
    assert folder.load("p") is None
    (tmp_path / "p.json").write_text("{")
    assert folder.load("p") is None


# --- What is made of the numbers.


def served() -> Served:
    """Two ranks, four iterations, 1 ms each where nothing is delayed: as in tests.bench.test_simulate."""
    slept = np.array([[10, 0, 0, 0], [0, 0, 10, 0]]) * MS
    runs: list[dict[str, Any]] = []
    arrays = {}
    for system, lag, undelayed, delayed in (
        ("gloo, lag 0", 0, 2.0, 25.0), ("bls, lag 0", 0, 1.0, 24.0), ("bls, lag 2", 2, 1.0, 16.0),
        ("put", None, 1.25, 15.0), ("put, sharded better", None, 0.5, 14.0),
    ):  # fmt: skip
        for case, ms in ((NONE, undelayed), ("5", delayed / 4), ("load 0.7", 1.0)):
            for repetition in range(2):
                arrays[f"{len(runs)}/slept"] = slept
                arrays[f"{len(runs)}/latency"] = np.array([[12, 4, 1, 1], [1, 1, 12, 4]]) * MS
                arrays[f"{len(runs)}/arrived"] = np.array([0, 5, 20, 40]) * MS
                runs.append({"case": case, "system": system, "repetition": repetition, "ms": ms, "lag": lag,
                             "others": 0.0, "stolen": 0.0})  # fmt: skip
    runs.append({"case": NONE, "system": ALONE, "repetition": 0, "ms": 0.9, "lag": None})
    values = {"workload": "balanced", "about": "two ranks", "runs": runs, "checks": [], "undelayed_ms": 1.0}
    return Served(Part("dlrm-balanced", {"effort": {"ranks": 2}}, values=values, arrays=arrays))


def test_a_model_s_runs_by_hand() -> None:
    one = served()
    assert one.levels() == ["5"]
    assert one.synchronous("5") == ["gloo, lag 0", "bls, lag 0"]
    assert one.uncoupled("5") == ["put"]
    assert (one.lag("bls, lag 2"), one.lag("put")) == (2, inf)
    # By hand: 24 ms at lag 0, 14 at lag 2 and without coupling.
    assert one.model_gain("5", "put") == one.model_gain("5", "bls, lag 2") == pytest.approx(24 / 14)
    assert one.model_gain("5", "bls, lag 0") == 1
    assert one.over_model("5", "bls, lag 0").value == pytest.approx(1)
    assert one.over_model("5", "put").value == pytest.approx(15 / 14)
    # Rank 0: input at 0, ready at 11; at 5, ready at 12. Rank 1: at 20, ready at 31. Eight latencies, 11 11 7 1 ...
    assert one.model_latency("load 0.7", "put")[0][0] == pytest.approx(1)
    assert one.model_latency("load 0.7", "put")[0][3] == pytest.approx(11, abs=0.1)


def test_goals_by_hand() -> None:
    parts = {"dlrm-balanced": served().part}
    gain, latency, balanced, digests, whole = goals.goals(parts)
    assert gain.found.startswith("0.93: 1.60 (1.60–1.60) times (put against bls, lag 0), the model's 1.71")
    assert gain.reached
    assert latency.found.startswith("1.09 (1.09–1.09): 12.0 ms, the model 11.0 ms")
    assert balanced.found == "2.0 (2.0–2.0) (bls, lag 0 against gloo, lag 0)"
    assert balanced.reached
    assert (digests.reached, whole.reached) == (None, None)
    lost = findings.not_better(parts)
    assert "DLRM, balanced, delays none: put ran at 0.80 (0.80–0.80) of the speed of bls, lag 0" in lost
    assert any("one process with 2 threads" in line and "took 0.90" in line for line in lost)
    (row,) = (row for row in tables.throughput(served()).rows if row[0] == "put")
    assert row == ["put", "1.25 (0.80 (0.80–0.80))", "3.75 (1.60 (1.60–1.60))", "1.71"]


def test_a_digest_that_differs_is_told() -> None:
    part = served().part
    run = {"system": "put", "delay": NONE, "auc": 0.7, "pooled_sha256": "a" * 64, "logits_sha256": "b" * 64}
    part.values["checks"] = [run, run | {"logits_sha256": "c" * 64}]
    (goal,) = (goal for goal in goals.goals({"dlrm-balanced": part}) if goal.what.startswith("digests"))
    assert (goal.found, goal.reached) == ("NOT EQUAL in all 2 runs, of 1 models", False)


def test_the_simulator_is_checked_against_what_was_slept() -> None:
    stalls = [[[[0, 10 * MS]], [[2, 10 * MS]]]]
    case = Case(2, "4K", 2, delay="exp:p=0.1,mean=5ms")
    results = Results("c", {}, measurements=[
        Measurement(dataclasses.replace(case, delay="none"), "bls", 4, [[1.0 * MS]]),
        Measurement(case, "bls", 4, [[15 * MS / 4]], stalls=stalls),
    ])  # fmt: skip
    (check,) = where.checks(results)
    assert (check.measured, check.simulated) == (3.75, 3.5)
    part = Part("where", {}, values={"results": dataclasses.asdict(results), "ranks": [2]})
    (goal,) = (goal for goal in goals.goals({"where": part}) if goal.what.startswith("the simulator"))
    assert goal.found.startswith("at most 7.1% off")
    assert goal.reached


def test_maps_behave_as_they_must() -> None:
    gain = where.maps(dataclasses.replace(TRIAL.where, simulated_ranks=[2, 16], simulated_iterations=300))
    for one in (gain["mean"], gain["slow"], gain["ranks"]):
        assert (one[:, 0] == 1).all()
        assert (np.diff(one, axis=1) > -1e-9).all()  # a longer lag never loses
    assert (gain["ranks"][1, 1:] > gain["ranks"][0, 1:]).all()  # more ranks gain more


def test_what_is_advised() -> None:
    found = {plan: advice.lag for plan, _, advice in where.advice(20e-6)}
    assert found["none"] == found["slow:time=1ms"] == 0
    assert found["rotate:every=10,time=10ms"] is not None and found["rotate:every=10,time=10ms"] >= 8


def test_data_that_are_not_there_are_left_out(tmp_path: Path) -> None:
    found, absent = workloads(None, tmp_path)
    assert [one.name for one in found] == ["balanced", "skewed"]
    assert set(absent) == {"criteo", "ali-ccp", "meta"}
    assert "criteo_kaggle_first8000.tsv.gz: not in --data" in workloads(tmp_path, tmp_path)[1]["criteo"]
    assert not json.dumps(absent).count(str(tmp_path))


def test_a_document_without_a_place_for_it_is_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    with pytest.raises(SystemExit):
        here("--document", str(page), "--out", str(tmp_path / "out"))
    assert "has no line <!-- bench paper -->" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_headline_is_of_what_was_measured() -> None:
    text = findings.headline({"dlrm-balanced": served().part})
    gain = "ran at 1.60 times that of the best synchronous system."
    assert text.endswith(f"delayed by 5 times an iteration now and then {gain}")
    assert findings.headline({}) == ""
