"""Metrics, delays and the model of the loop."""

from __future__ import annotations

import numpy as np
import pytest

from blsrdma import lag as model
from dlrm import delays, timeline
from dlrm.errors import OptionError
from dlrm.metrics import accuracy, auc, percentiles


def brute_force_auc(labels: np.ndarray, scores: np.ndarray) -> float:
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[labels == 1] for b in scores[labels == 0]]
    return float(np.mean(pairs))


@pytest.mark.parametrize("distinct", [2, 5, 1000])
def test_auc_counts_pairs_with_ties_as_halves(distinct: int) -> None:
    random = np.random.default_rng(distinct)
    labels = (random.random(200) < 0.3).astype(np.float32)
    scores = (random.integers(0, distinct, 200) / distinct + 0.1 * labels).astype(np.float32)
    assert auc(labels, scores) == pytest.approx(brute_force_auc(labels, scores), abs=1e-12)


def test_metrics_where_there_is_nothing_to_measure() -> None:
    assert auc(np.ones(3), np.arange(3)) is None
    assert accuracy(np.empty(0), np.empty(0)) is None
    assert percentiles(np.empty(0)) == {"p50": None, "p95": None, "p99": None}
    assert accuracy(np.array([1, 0, 1]), np.array([0.5, 0.2, 0.4])) == pytest.approx(2 / 3)


def test_exponential_delays_are_a_function_of_seed_rank_and_iteration() -> None:
    plan, again, other = (delays.parse("exp:p=0.25,mean=2ms", seed) for seed in (7, 7, 8))
    times = np.array([[plan.seconds(rank, i, 4) for i in range(2000)] for rank in range(4)])
    assert all(again.seconds(2, i, 4) == times[2, i] for i in range(50))
    assert any(other.seconds(2, i, 4) != times[2, i] for i in range(50))
    assert (times > 0).mean() == pytest.approx(0.25, abs=0.03)
    assert times[times > 0].mean() == pytest.approx(2e-3, rel=0.1)


def test_the_rotating_straggler_visits_each_rank() -> None:
    plan = delays.parse("rotate:every=3,time=10ms", 0)
    stalls = [(rank, i) for i in range(12) for rank in range(3) if plan.seconds(rank, i, 3)]
    assert stalls == [(0, 2), (1, 5), (2, 8), (0, 11)]
    assert plan.seconds(0, 2, 3) == 0.01


def test_the_last_rank_is_slow_always_or_at_random() -> None:
    always = delays.parse("slow:time=1ms", 0).table(3, 5)
    assert always.tolist() == [[0.0] * 5, [0.0] * 5, [0.001] * 5]
    times = delays.parse("one:p=0.25,time=1ms", 3).table(3, 4000)
    assert not times[:2].any()
    assert (times[2] > 0).mean() == pytest.approx(0.25, abs=0.03)


def test_log_normal_delays_have_their_median_and_spread() -> None:
    times = delays.parse("lognormal:p=0.5,median=2ms,sigma=0.7", 1).table(4, 4000)
    stalls = np.log(times[times > 0])
    assert (times > 0).mean() == pytest.approx(0.5, abs=0.03)
    assert np.median(stalls) == pytest.approx(np.log(2e-3), abs=0.05)
    assert stalls.std() == pytest.approx(0.7, rel=0.05)


def test_each_rank_pauses_once_in_each_period() -> None:
    times = delays.parse("pause:every=20,time=5ms", 1).table(3, 2000).reshape(3, 100, 20)
    assert set(times.ravel()) == {0.0, 5e-3}
    assert ((times > 0).sum(axis=2) == 1).all()
    assert (times[0] != times[1]).any()


@pytest.mark.parametrize(
    "text",
    ["none", "exp:p=0.3,mean=2ms", "lognormal:p=0.5,median=1ms,sigma=1", "rotate:every=3,time=1ms", "slow:time=2ms",
     "one:p=0.5,time=3ms", "pause:every=7,time=1ms", "all:time=1ms", "all:time=1ms+exp:p=0.3,mean=2ms+slow:time=1ms"],
)  # fmt: skip
def test_a_row_from_anywhere_is_what_each_iteration_says(text: str) -> None:
    plan = delays.parse(text, 5)
    times = plan.table(3, 40)
    assert times.tolist() == [[plan.seconds(rank, i, 3) for i in range(40)] for rank in range(3)]
    assert plan.row(2, 11, 9, 3).tolist() == times[2, 11:20].tolist()
    assert plan.row(2, 11, 0, 3).shape == (0,)


def test_plans_add_up() -> None:
    parts = [delays.parse(text, 5).table(3, 40) for text in ("all:time=1ms", "exp:p=0.3,mean=2ms")]
    assert (parts[0] == 1e-3).all()
    assert (delays.parse("all:time=1ms+exp:p=0.3,mean=2ms", 5).table(3, 40) == sum(parts)).all()


def test_no_delay() -> None:
    assert delays.parse("none", 0).seconds(0, 0, 1) == 0


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sometimes", "not understood"),
        ("exp:p=0.1", "not understood"),
        ("exp:p=2,mean=1ms", "between 0 and 1"),
        ("exp:p=x,mean=1ms", "not a number"),
        ("exp:p=0.1,mean=5", "not a time"),
        ("rotate:every=0,time=1ms", ">= 1"),
        ("rotate:every=inf,time=1ms", ">= 1"),
        ("rotate:every=2,time=-1ms", "not a time"),
        ("lognormal:p=1,median=1ms,sigma=nan", "between 0 and 10"),
        ("slow:every=2,time=1ms", "not understood"),
        ("one:p=-1,time=1ms", "between 0 and 1"),
        ("pause:every=1.5,time=1ms", ">= 1"),
        ("all:time=1ms+never", "not understood"),
    ],
)
def test_bad_plans_are_refused(text: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        delays.parse(text, 0)


@pytest.mark.parametrize("lag", [0, 1, 3, 7, 60])
def test_the_floor_is_the_max_plus_model_where_nothing_follows_the_post(lag: int) -> None:
    work = np.random.default_rng(lag).exponential(1.0, (4, 50))
    zero = np.zeros_like(work)
    assert timeline.floor(work, zero, np.zeros(4), lag) == pytest.approx(model.max_plus(work, lag)[:, -1].max())


def test_phases_and_laps_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that says how often it was asked."""
    times = iter(range(1000))
    monkeypatch.setattr(timeline, "clock", lambda: next(times))
    run = timeline.Timeline()
    watch = timeline.Stopwatch(run)  # 0
    with run.phase("dense"), run.phase("assemble"):  # 1 to 4, 2 to 3
        pass
    with run.phase("wait"):  # 5 to 6
        pass
    assert watch.lap() == 7 - 1
    with run.phase("post"):  # 8 to 9
        pass
    assert watch.lap() == 10 - 7 - 1
    assert run.phases() == dict.fromkeys(timeline.PHASES, 0) | {"dense": 2, "assemble": 1, "wait": 1, "post": 1}
    assert run.processor() is None


def test_work_after_the_post_holds_nobody_else_up() -> None:
    before, after = np.ones((2, 3)), np.zeros((2, 3))
    after[0, 0] = 0.5  # rank 0 is late for its second post, and all wait for that at lag 0
    assert timeline.floor(before, after, np.zeros(2), 0) == pytest.approx(3.5)
    assert timeline.floor(before, after[:, ::-1], np.array([0.0, 0.25]), 0) == pytest.approx(3.5)
    assert timeline.floor(before, np.zeros((2, 3)), np.array([0.0, 0.25]), 0) == pytest.approx(3.25)
