"""The bounded-lag rules, explored to the last state: they hold; each of them broken, the counter-example is found.

With -s each test prints how many states it visited, and the shortest counter-example.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from blsrdma.windows import windows_needed
from tests.model.explore import Report, explore
from tests.model.protocol import Protocol, Settings, State

slow = pytest.mark.slow


def _explored(settings: Settings, record_property: Callable[[str, object], None]) -> Report:
    report = explore(Protocol(settings))
    print(f"\n  {settings}\n    {report}")
    record_property("states", report.states)
    return report


@pytest.mark.parametrize(
    "settings",
    [
        # every interleaving, a crash at any moment included
        Settings(ranks=2, lag=0, parts=2, doomed=1),
        Settings(ranks=2, lag=1, parts=1, doomed=1),
        Settings(ranks=2, lag=2, parts=0, doomed=1, eager="local"),
        Settings(ranks=3, lag=0, parts=0, eager="local"),
        # more ranks: messages arrive at once
        Settings(ranks=3, lag=0, eager="arrivals", doomed=2),
        Settings(ranks=3, lag=1, eager="arrivals"),
        Settings(ranks=3, lag=2, parts=0, eager="arrivals"),
        # and are released at once: is anyone stuck after a crash?
        Settings(ranks=3, lag=1, parts=0, eager="releases", doomed=1),
        # the same, larger
        pytest.param(Settings(ranks=2, lag=1, parts=2, doomed=1), marks=slow),
        pytest.param(Settings(ranks=2, lag=2, parts=0), marks=slow),
        pytest.param(Settings(ranks=3, lag=0, parts=0, eager="local", doomed=1), marks=slow),
        pytest.param(Settings(ranks=3, lag=1, parts=0, eager="arrivals", doomed=1), marks=slow),
        pytest.param(Settings(ranks=3, lag=1, parts=0, eager="releases", doomed=2), marks=slow),
        pytest.param(Settings(ranks=3, lag=2, parts=0, eager="releases", doomed=1), marks=slow),
    ],
    ids=str,
)
def test_the_rules_hold(settings: Settings, record_property: Callable[[str, object], None]) -> None:
    """No overwrite, no early read, no deadlock, the bound kept; after a crash every survivor ends with an error."""
    report = _explored(settings, record_property)
    assert report.verdict is None, str(report)
    assert report.states > 100  # it did go somewhere


@pytest.mark.parametrize(
    ("broken", "verdict"),
    [
        (Settings(lag=0, windows=1), "overwrite"),
        (Settings(lag=1, windows=3), "overwrite"),
        (Settings(lag=2, windows=5, eager="arrivals"), "overwrite"),
        (Settings(ranks=3, lag=0, windows=1, parts=0, eager="local"), "overwrite"),
        (Settings(ranks=3, lag=1, windows=3, parts=0, eager="arrivals"), "overwrite"),
        (Settings(ranks=3, lag=2, windows=5, parts=0, eager="arrivals"), "overwrite"),
        (Settings(lag=0, order="counter with data"), "early read"),
        (Settings(lag=0, order="counter with data", parts=2), "early read"),
        (Settings(lag=2, order="counter with data"), "early read"),
        (Settings(ranks=3, lag=0, order="counter with data"), "early read"),
        (Settings(ranks=3, lag=2, order="counter with data", eager="arrivals"), "early read"),
        (Settings(lag=0, releases=False), "overwrite"),
        (Settings(lag=2, releases=False, eager="arrivals"), "overwrite"),
        (Settings(lag=0, completion=False), "lead"),
        (Settings(lag=2, completion=False), "lead"),
        (Settings(lag=0, room=False), "queue"),
        pytest.param(Settings(lag=1, room=False), "queue", marks=slow),
        (Settings(lag=0, doomed=1, quarantine=False), "late put"),
        (Settings(ranks=3, lag=0, doomed=1, parts=0, blame="behind", eager="releases"), "deadlock"),
        (Settings(ranks=3, lag=1, doomed=1, parts=0, blame="behind", eager="releases"), "deadlock"),
    ],
    ids=str,
)
def test_a_broken_rule_is_found(broken: Settings, verdict: str, record_property: Callable[[str, object], None]) -> None:
    """One window fewer, the counter before the data, and every other rule of Settings: each is needed."""
    report = _explored(broken, record_property)
    assert (report.verdict or "holds").split(":")[0] == verdict


@pytest.mark.parametrize("lag", [0, 1, 2])
def test_the_windows_of_the_exchange(lag: int) -> None:
    """What blsrdma.windows computes is the smallest number that the model finds safe."""
    settings = Settings(lag=lag, parts=0, eager="arrivals")
    assert explore(Protocol(replace(settings, windows=windows_needed(lag)))).verdict is None
    assert explore(Protocol(replace(settings, windows=windows_needed(lag) - 1))).verdict is not None


@pytest.mark.parametrize(
    "settings",
    [
        Settings(lag=0),
        Settings(lag=0, doomed=1),
        Settings(lag=0, room=False),
        pytest.param(Settings(lag=1, doomed=1), marks=slow),
        pytest.param(Settings(ranks=3, lag=0, parts=0, eager="local"), marks=slow),
    ],
    ids=str,
)
def test_eager_events_hide_no_state(settings: Settings) -> None:
    """The interleavings that are left out lead to no state that would look different to the rules."""

    def reached(eager: Any, view: Callable[[State], object]) -> set[object]:
        model = Protocol(replace(settings, eager=eager))
        only = tuple(range(settings.ranks))
        model.ranks.renamings = {only: model.ranks.renamings[only]}  # ranks keep their names: sets are compared
        seen = set()
        explore(model, visit=lambda state: seen.add(view(state)))
        return seen

    for eager, view in VIEWS.items():
        assert reached(eager, view) == reached(settings.eager, view), eager


VIEWS: dict[str, Callable[[State], object]] = {
    "local": lambda state: (state.next, state.held, state.status, tuple([c.behind for c in state.channels])),
    "arrivals": lambda state: (state.next, state.held, state.status),
    "releases": lambda state: (state.next, state.status),
}


@pytest.mark.parametrize(
    "rule", [{"windows": 1}, {"order": "counter with data"}, {"releases": False}, {"completion": False}], ids=str
)
@pytest.mark.parametrize(
    ("ranks", "levels"), [(2, ["nothing", "local", "arrivals"]), pytest.param(3, ["local", "arrivals"], marks=slow)]
)
def test_eager_events_hide_no_fault(rule: dict[str, Any], ranks: int, levels: list[Any]) -> None:
    """Nor does a broken rule escape."""
    reports = [explore(Protocol(Settings(ranks=ranks, eager=eager, **rule))) for eager in levels]
    verdicts = {(report.verdict or "holds").split(":")[0] for report in reports}
    assert len(verdicts) == 1
    assert verdicts != {"holds"}
