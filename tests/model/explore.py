"""A small explicit-state model checker: visits every reachable state of a model, breadth first.

A model is a set of pure functions over hashable states (`Model`). What is decided, over *all* reachable states:

* `Model.broken` holds nowhere (safety);
* every state that is not settled has a step that is certain to happen sooner or later (no deadlock);
* from every state a settled one can be reached by certain steps alone (progress). Proved by a witness: the first
  certain step of each state leads, followed again and again, to a settled one. Only where it does not is one searched.

Steps that may never happen (a crash, a late put of a dead rank) are explored like the others, but nothing may depend on
them. Breadth first: the counter-example that is found is a shortest one.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

State = TypeVar("State", bound="Hashable")
Event = tuple[str | int, ...]  # a verb, then the ranks and iterations it is about


class Step(NamedTuple, Generic[State]):
    event: Event
    state: State
    certain: bool  # once possible it happens sooner or later, unless something else makes it impossible


class Model(Protocol[State]):
    def initial(self) -> State: ...

    def steps(self, state: State) -> Sequence[Step[State]]:
        """What can happen next. The order matters only for the speed of the progress check."""

    def canonical(self, state: State) -> State:
        """One representative of all states that differ only in the names of ranks (the identity is one, too)."""

    def broken(self, state: State) -> str | None:
        """Which invariant does not hold, in words."""

    def settled(self, state: State) -> bool:
        """Whether nothing more needs to happen."""

    def unreduced(self) -> Model[State]:
        """The same model with no interleaving left out."""

    def story(self, path: Sequence[tuple[Event, State]]) -> list[str]:
        """A run in words: the events, each with the state that it leads to; the first state is initial()."""


@dataclass(frozen=True)
class Report:
    """What an exploration found: `verdict` is None, or what is wrong, and then `trace` is a shortest way to it."""

    states: int
    steps: int
    depth: int
    seconds: float
    verdict: str | None = None
    trace: tuple[str, ...] = ()

    def __str__(self) -> str:
        counts = f"{self.states:,} states, {self.steps:,} steps, depth {self.depth}, {self.seconds:.1f} s"
        if self.verdict is None:
            return f"holds: {counts}"
        return "\n    ".join([f"{self.verdict} ({counts}) after", *self.trace])


class TooManyStates(Exception):
    """The limit was reached: the model is larger than the caller thought, and nothing has been decided."""


def explore(
    model: Model[State], limit: int = 3_000_000, visit: Callable[[State], object] = lambda state: None
) -> Report:
    """Call `visit` for every state of `model`; end at the first one that is wrong. Raises TooManyStates."""
    began = time.perf_counter()
    first = model.canonical(model.initial())
    numbers = {first: 0}
    found = [first]
    parents = [-1]
    depths = [0]
    witness: list[int] = []  # per state: itself where settled, else where its first certain step leads
    steps = 0

    def report(verdict: str | None = None, number: int = -1) -> Report:
        seconds = time.perf_counter() - began
        if verdict is None:
            return Report(len(found), steps, max(depths), seconds)
        run = _run_to(model, found, parents, number)
        # Canonical states have other names for the ranks than the run has.
        verdict = (model.broken(run[-1][1]) if run else None) or verdict
        return Report(len(found), steps, max(depths), seconds, verdict, tuple(model.story(run)))

    for number, state in enumerate(found):  # `found` grows meanwhile
        visit(state)
        wrong = model.broken(state)
        if wrong:
            return report(wrong, number)
        settled = model.settled(state)
        forward = number if settled else -1
        for step in model.steps(state):
            steps += 1
            after = model.canonical(step.state)
            known = numbers.get(after)
            if known is None:
                known = numbers[after] = len(found)
                found.append(after)
                parents.append(number)
                depths.append(depths[number] + 1)
            if forward < 0 and step.certain:
                forward = known
        if forward < 0:
            return report("deadlock: nothing more is certain to happen", number)
        witness.append(forward)
        if len(found) > limit:
            raise TooManyStates(f"more than {limit:,} states")

    stuck = _stuck(model, found, numbers, _undecided(witness))
    if stuck:
        return report("no progress: no settled state can be reached any more", min(stuck))
    return report()


def _run_to(model: Model[State], found: list[State], parents: list[int], number: int) -> list[tuple[Event, State]]:
    """The events that lead to a state, and the states in between, with the ranks' names kept from the start."""
    path = []
    while number > 0:
        path.append(found[number])
        number = parents[number]
    state = model.initial()
    run = []
    # Which event a reduced model does first depends on the ranks' names.
    every = model.unreduced()
    for target in reversed(path):
        step = next(step for step in every.steps(state) if model.canonical(step.state) == target)
        state = step.state
        run.append((step.event, state))
    return run


def _undecided(witness: list[int]) -> set[int]:
    """The states whose witness runs in a circle instead of ending in a settled state."""
    unknown, on_path, good, bad = range(4)
    marks = bytearray(len(witness))
    for start in range(len(witness)):
        path = []
        at = start
        while marks[at] == unknown:
            marks[at] = on_path
            path.append(at)
            at = witness[at]
        # The path has met itself: in a settled state, whose witness is the state itself, or in a circle.
        end = marks[at] if marks[at] != on_path else good if witness[at] == at else bad
        for each in path:
            marks[each] = end
    return {number for number, mark in enumerate(marks) if mark == bad}


def _stuck(model: Model[State], found: list[State], numbers: dict[State, int], undecided: set[int]) -> set[int]:
    """Those of the undecided states from which certain steps do not lead to a decided one."""
    before: dict[int, list[int]] = {}
    todo = []
    for number in undecided:
        after = {numbers[model.canonical(step.state)] for step in model.steps(found[number]) if step.certain}
        if after <= undecided:
            for each in after:
                before.setdefault(each, []).append(number)
        else:
            todo.append(number)
    stuck = undecided - set(todo)
    while todo:
        settles = set(before.get(todo.pop(), ())) & stuck
        stuck -= settles
        todo += settles
    return stuck
