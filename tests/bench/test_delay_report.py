"""What is said of delayed runs: by hand."""

from __future__ import annotations

from bench.cases import Case
from bench.delay_report import over_model, tables, undelayed
from bench.results import Measurement, Results

MS = 1e6


def delayed(system: str, lag: int, took: float) -> Measurement:
    # Two ranks, four iterations: rank 0 slept 10 ms in iteration 0, rank 1 10 ms in iteration 2.
    stalls = [[[[0, 10_000_000]], [[2, 10_000_000]]]]
    return Measurement(Case(2, "1K", lag, delay="d"), system, 4, [[took * MS / 4]], stalls=stalls)


def calm(system: str, lag: int, took: float) -> Measurement:
    return Measurement(Case(2, "1K", lag), system, 4, [[took * MS]])


RESULTS = Results("c", {}, measurements=[
    calm("bls", 0, 1.5), calm("gloo", 0, 3), calm("bls", 2, 1), calm("gloo", 2, 3),
    delayed("bls", 0, 24), delayed("gloo", 0, 48), delayed("gloo-nb", 0, 30),
    delayed("bls", 2, 28), delayed("gloo", 2, 48), delayed("gloo-nb", 2, 21),
])  # fmt: skip


def test_the_cost_is_the_smallest_of_any_system_at_any_lag() -> None:
    assert undelayed(RESULTS, Case(2, "1K", 0, delay="d")) == MS


def test_measured_over_the_model() -> None:
    # With 1 ms for an exchange: 24 ms at lag 0, 14 ms at lag 2 (tests.bench.test_simulate has the hand count).
    found = {(m.case.lag, m.system): over_model(m, MS) for m in RESULTS.measurements if m.stalls}
    assert found == {
        (0, "bls"): 1, (0, "gloo"): 2, (0, "gloo-nb"): 30 / 24,
        (2, "bls"): 2, (2, "gloo"): 2, (2, "gloo-nb"): 1.5,  # gloo blocks: lag 0 is its model
    }  # fmt: skip


def test_the_tables() -> None:
    models, peers = tables(RESULTS)
    assert models.rows[0] == ["none", "0", "1.000", "1.000", "1.500 (1.50)", "3.000 (3.0)", "–"]
    assert models.rows[-1] == ["d", "2", "3.500", "3.500", "7.000 (2.0)", "12.000 (2.0)", "5.250 (1.50)"]
    assert models.rows[-2][:4] == ["d", "0", "6.000", "3.500"]
    assert peers.rows[-1] == ["d", "2", "1.71 gloo", "1.71", "0.75 gloo-nb"]
    assert peers.rows[-2] == ["d", "0", "2.0 gloo", "1.00", "1.25 gloo-nb"]
