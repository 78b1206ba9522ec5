"""The rule of requests and responses, explored to the last state: it holds; broken, the counter-example is found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from blsrdma.request_windows import windows_needed
from tests.model.explore import explore
from tests.model.lookups import Lookups, Settings


@pytest.mark.parametrize(
    "settings",
    [Settings(lag=0, parts=2), Settings(lag=1, parts=2), Settings(lag=2), Settings(lag=3, parts=0)],
    ids=str,
)
def test_the_rule_holds(settings: Settings) -> None:
    report = explore(Lookups(settings))
    print(f"\n  {settings}\n    {report}")
    assert report.verdict is None, str(report)
    assert report.states > 10


@pytest.mark.parametrize(
    ("broken", "verdict"),
    [
        (Settings(lag=0, release=False), "overwrite: a response"),
        (Settings(lag=2, release=False, parts=0), "overwrite: a response"),
        (Settings(lag=1, windows=1), "overwrite: a request"),
        (Settings(lag=3, windows=3, parts=0), "overwrite: a request"),
        (Settings(lag=0, order="counter with data"), "early read: a request"),
        (Settings(lag=2, order="counter with data", parts=2), "early read: a request"),
        (Settings(lag=0, room=False), "queue: a "),
        (Settings(lag=2, room=False), "queue: a "),
    ],
    ids=str,
)
def test_a_broken_rule_is_found(broken: Settings, verdict: str) -> None:
    report = explore(Lookups(broken))
    print(f"\n  {broken}\n    {report}")
    assert (report.verdict or "holds").startswith(verdict), str(report)


@pytest.mark.parametrize("lag", [1, 2, 3])
def test_as_many_windows_as_the_lookup_has(lag: int) -> None:
    """What blsrdma.request_windows computes is the smallest number that the model finds safe."""
    settings = Settings(lag=lag, parts=0)
    assert explore(Lookups(replace(settings, windows=windows_needed(lag)))).verdict is None
    assert explore(Lookups(replace(settings, windows=windows_needed(lag) - 1))).verdict is not None
