"""The rules of versions of the tables, explored to the last state: they hold; broken, the counter-example is found."""

from __future__ import annotations

import pytest

from tests.model.explore import explore
from tests.model.versions import Settings, Versions


@pytest.mark.parametrize(
    "settings",
    [
        Settings(owners=1, lag=1, versions=3),
        pytest.param(Settings(owners=2, lag=0, versions=1), marks=pytest.mark.slow),
        pytest.param(Settings(owners=2, lag=0), marks=pytest.mark.slow),
        pytest.param(Settings(owners=2, lag=0, versions=1, deaths=True), marks=pytest.mark.slow),
        pytest.param(Settings(owners=2, lag=1), marks=pytest.mark.slow),
        pytest.param(Settings(owners=2, lag=0, deaths=True), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_rules_hold(settings: Settings) -> None:
    report = explore(Versions(settings))
    print(f"\n  {settings}\n    {report}")
    assert report.verdict is None, str(report)
    assert report.states > 100


@pytest.mark.parametrize(
    "broken",
    [Settings(adopt="any"), Settings(owners=1, complete=False), Settings(owners=1, wait=False)],
    ids=str,
)
def test_a_broken_rule_is_found(broken: Settings) -> None:
    report = explore(Versions(broken))
    print(f"\n  {broken}\n    {report}")
    assert report.verdict == "an owner is asked for a version that it does not have", str(report)
