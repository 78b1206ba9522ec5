"""torch's own distributed test-suite. `bash ci/torch-suites` runs it; by hand: python -m tests.backend.torch_suite."""

from __future__ import annotations

import pytest

from tests.backend.torch_suite import FAMILIES, run_family

pytest.importorskip("expecttest", reason="torch's test-suite needs expecttest: bash ci/torch-suites")
pytestmark = pytest.mark.slow


def test_all_to_all_family():
    outcomes = run_family("all_to_all", "bls")
    assert len(outcomes) == 12 and set(outcomes.values()) == {"ok"}, outcomes


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"all_to_all"}))
def test_as_many_as_gloo(family):
    ours, theirs = run_family(family, "bls"), run_family(family, "gloo")
    assert ours.keys() == theirs.keys()
    worse = {name: ours[name] for name, outcome in theirs.items() if outcome == "ok" and ours[name] != "ok"}
    assert not worse, worse
