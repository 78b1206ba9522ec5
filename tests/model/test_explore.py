"""The model checker itself, on models small enough to be checked by eye."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from tests.model.explore import Event, Step, TooManyStates, explore

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Graph:
    """States are letters; `edges` are certain, `perhaps` are not; A is the first, S the settled one, X a broken one."""

    edges: str
    perhaps: str = ""
    alike: dict[str, str] = field(default_factory=dict)

    def initial(self) -> str:
        return "A"

    def steps(self, state: str) -> list[Step[str]]:
        return [
            Step((edge,), edge[1], certain)
            for edges, certain in ((self.edges, True), (self.perhaps, False))
            for edge in edges.split()
            if edge[0] == state
        ]

    def canonical(self, state: str) -> str:
        return self.alike.get(state, state)

    def broken(self, state: str) -> str | None:
        return "broken" if state == "X" else None

    def settled(self, state: str) -> bool:
        return state == "S"

    def unreduced(self) -> Graph:
        return self

    def story(self, path: Sequence[tuple[Event, str]]) -> list[str]:
        return [state for _, state in path]


@pytest.mark.parametrize(
    ("graph", "verdict", "trace"),
    [
        (Graph("AB BS SA"), None, ""),
        (Graph("AB BA AS"), None, ""),  # the witness runs in a circle, but there is a way out
        (Graph("AB BA BC CB CS"), None, ""),
        (Graph("AB BC CX AD DX AS"), "broken", "DX"),  # the shorter of two ways
        (Graph("AB AS BC"), "deadlock", "BC"),
        (Graph("AB AS", perhaps="BS"), "deadlock", "B"),  # nothing may depend on what may never happen
        (Graph("AS AB BC CB"), "no progress", "B"),
        (Graph("AS", perhaps="SX"), "broken", "SX"),  # all steps are explored
        (Graph("AB AD DE EX BS", alike={"D": "B", "B": "B"}), None, ""),  # trusts the names it is told to be alike
        (Graph("AB BC AD DE EX CX", alike={"D": "B", "E": "C"}), "broken", "BCX"),
    ],
)
def test_what_it_finds(graph: Graph, verdict: str | None, trace: str) -> None:
    report = explore(graph)
    assert (report.verdict or "None").split(":")[0] == str(verdict)
    assert "".join(report.trace) == trace


def test_it_counts() -> None:
    seen: list[str] = []
    report = explore(Graph("AB BC CA AS SA"), visit=seen.append)
    assert (report.states, report.steps, report.depth) == (4, 5, 2)
    assert sorted(seen) == ["A", "B", "C", "S"]


def test_the_limit_is_an_error_not_a_verdict() -> None:
    with pytest.raises(TooManyStates):
        explore(Graph("AB BC CD DS"), limit=2)
