"""Tables and files, from results made up."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import pytest
from rich.console import Console

from bench import report
from bench.cases import Case
from bench.publish import publish, replaced
from bench.results import Measurement, Results
from bench.table import Table, microseconds, times


@pytest.fixture(name="results")
def _results() -> Results:
    facts = [{"memory_bytes": 4096, "paths": ["direct (mapped)"]}] * 2
    results = Results("python -m bench alltoallv", {"repeat": 2})
    results.environment = {
        "date": "2026-01-01T00:00:00+00:00", "commit": "abc", "python": "3", "kernel": "6", "cpu": "one", "cores": 2,
        "caches": "L1", "memory_bytes": 1 << 30, "load_before": 0.0, "busy_before": 0.0,
    }  # fmt: skip
    for lag in (0, 4):
        for system, ns in (("bls", 1000.0), ("bls-wait", 900.0), ("gloo", 250_000.0), ("openmpi", 4000.0)):
            case, samples = Case(2, "1K", lag), [[ns, ns * 1.1, ns], [ns, ns]]
            results.measurements.append(Measurement(case, system, 100, samples, 10, [1.0], [0.1], facts))
    results.skipped["nccl, 2 ranks"] = "no GPUs"
    return results


def _markdown(results: Results) -> str:
    return "\n".join([*report.about(results), *(table.markdown() for table in report.tables(results))])


def test_ratios_are_to_the_best_peer_and_not_of_diagnostics(results: Results) -> None:
    text = _markdown(results)
    assert "| 2 | 1 KiB | 0 | 4.0 [4.0–4.0] openmpi |" in text
    assert "| ranks | bytes per peer | lag | bls |" in text
    assert "| 2 | 1 KiB | 0 | 1.00 ±0% | 0.90 ±0% | 250 ±0% | 4.00 ±0% |" in text
    assert "left out: nccl, 2 ranks: no GPUs" in text
    assert "direct (mapped)" in text


def test_cost_of_a_lag(results: Results) -> None:
    assert [table.title for table in report.tables(results)][-1].startswith("A lag without delays")
    assert report.tables(results)[-1].rows == [["2", "1 KiB", "4", "view", "1.00", "8.0 KiB", "2.0 KiB"]]


def test_a_missing_system_is_a_dash(results: Results) -> None:
    results.measurements = [m for m in results.measurements if m.system != "gloo" or m.case.lag == 0]
    assert "–" in report.tables(results)[0].rows[1]


def test_results_come_back_from_a_file(results: Results, tmp_path: Path) -> None:
    results.save(tmp_path / "new" / "r.json")
    again = Results.load(tmp_path / "new" / "r.json")
    assert again.cases() == results.cases()
    assert [m.system for m in again.measurements] == [m.system for m in results.measurements]
    assert again.measurements[0] == results.measurements[0]
    assert _markdown(again) == _markdown(results)


def test_picture(results: Results, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from bench.plot import draw

    results.measurements += [Measurement(Case(2, "zipf", 0), "bls", 1, [[5000.0, 6000.0]])]
    draw(results, tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_numbers_and_table() -> None:
    assert [microseconds(ns) for ns in (812, 12_345, 345_678, 5_640_000)] == ["0.81", "12.3", "346", "5,640"]
    assert [times(x) for x in (0.931, 4.13, 12.4)] == ["0.93", "4.1", "12"]
    out = io.StringIO()
    Table("t [not markup]", ["<name", "x"], [["a [b]", "1"]], ["n [1–2]"]).print(Console(file=out, markup=False))
    printed = " ".join(out.getvalue().split())
    assert all(text in printed for text in ("t [not markup]", "a [b]", "n [1–2]"))


def test_a_block_of_a_document_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "d.md"
    path.write_text("before\n<!-- bench x -->\nold\n<!-- end x -->\nafter\n")
    options = argparse.Namespace(markdown=True, document=(path, "x"))
    table = Table("title", ["a"], [["1"]])
    for _ in range(2):
        publish(options, "the command", ["a line"], [table])
    text = path.read_text()
    assert text.startswith("before\n<!-- bench x -->\n\n`the command`\n")
    assert text.endswith("<!-- end x -->\nafter\n")
    assert text.count("| 1 |") == 1
    assert "| 1 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="<!-- bench y -->"):
        replaced(text, "y", "new")
