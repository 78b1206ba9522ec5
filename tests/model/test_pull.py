"""Messages larger than a window: what the pulling of payloads asks of the exchange, and of the application."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.model.explore import explore
from tests.model.pull import Pull, Settings

slow = pytest.mark.slow


@pytest.mark.parametrize(
    "settings",
    [
        Settings(lag=0, doomed=1),
        Settings(lag=0, buffers=2, doomed=1),
        Settings(lag=1),
        Settings(lag=1, waits="when due", doomed=1),
        Settings(lag=2, waits="when due", doomed=1),
        Settings(lag=0, pulls="background", waits="any", asks="any", doomed=1),
        Settings(lag=1, pulls="background", waits="when due", asks="any", buffers=1),
        Settings(lag=0, pulls="calls", asks="any", doomed=1),  # what Handle.sent() does
        Settings(lag=0, pulls="calls", asks="any", buffers=2),
        Settings(lag=1, pulls="calls", asks="any"),
        pytest.param(Settings(lag=1, doomed=1), marks=slow),
        pytest.param(Settings(ranks=3, lag=0), marks=slow),
        pytest.param(Settings(ranks=3, lag=0, waits="when due", doomed=1), marks=slow),
    ],
    ids=str,
)
def test_pulling(settings: Settings, record_property: Callable[[str, object], None]) -> None:
    """No buffer may be overwritten before it was pulled, nobody is stuck, both directions at once."""
    report = explore(Pull(settings))
    print(f"\n  {settings}\n    {report}")
    record_property("states", report.states)
    assert report.verdict is None, str(report)
    assert report.states > 100  # it did go somewhere


@pytest.mark.parametrize(
    ("broken", "verdict"),
    [
        # sent() must wait for the receiver, and for the oldest message that it has not pulled
        (Settings(acks="left"), "send buffer"),
        (Settings(lag=1, acks="newest"), "send buffer"),
        # a message that is released unread must be acknowledged, too, and not only when its receiver goes on
        (Settings(unread="never"), "deadlock"),
        (Settings(unread="post"), "deadlock"),
        (Settings(lag=1, unread="post"), "deadlock"),
        # where payloads are pulled in wait(), sent() needs the peer's wait():
        (Settings(asks="any"), "deadlock"),  # both ask for sent(i) before they wait for i
        (Settings(lag=1, waits="any"), "deadlock"),  # one waits for i + 1, the other cannot post it before sent(i)
        (Settings(lag=1, waits="when due", buffers=1), "deadlock"),  # fewer than lag + 1 send buffers
        (Settings(lag=2, waits="when due", buffers=2), "deadlock"),
        # the survivor that notices first must not touch what the other is still pulling
        (Settings(ranks=3, doomed=1, failed="reuse"), "send buffer"),
    ],
    ids=str,
)
def test_a_broken_rule_is_found(broken: Settings, verdict: str, record_property: Callable[[str, object], None]) -> None:
    report = explore(Pull(broken))
    print(f"\n  {broken}\n    {report}")
    record_property("states", report.states)
    assert (report.verdict or "holds").split(":")[0] == verdict
