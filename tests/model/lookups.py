"""Requests and responses of one pair of ranks as a model: one asks, the other serves. Pairs do not touch each other.

Written from the rules (blsrdma/request_windows.py), not from the code. Both directions are the channel of channel.py:
puts whose parts land in any order, a flush, a counter. Other events:

    ask       the client writes its next request, when the rule allows it
    serve     the owner answers the oldest request that its counter covers; it may do so at any later moment
    consume   the client takes the oldest response that its counter covers out of its window, at any later moment

Requests have no numbers: everything is counted from the oldest response that has not been consumed, so the states are
finitely many although the requests are not. Not modelled: failures (a failed owner's windows are not used again), and
requests that are cut (each part is a request).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from tests.model.channel import COUNTING, Channel, moves, posted
from tests.model.explore import Event, Step
from tests.model.ranks import changed

if TYPE_CHECKING:
    from collections.abc import Sequence


class State(NamedTuple):
    asked: int  # requests written and not consumed
    served: int  # of these: answered
    requests: Channel
    responses: Channel

    @property
    def askable(self) -> int:
        """Requests that the owner's counter covers."""
        return self.asked - self.requests.behind

    @property
    def arrived(self) -> int:
        """Responses that the client's counter covers."""
        return self.served - self.responses.behind


@dataclass(frozen=True)
class Settings:
    """The rule as it is, or with a part of it broken.

    windows   each way; None: lag + 1
    release   request n is written when the response to n - lag - 1 has been consumed; else when it has arrived
    order     see protocol.py
    room      a message is queued only when the one `windows` before it has left
    """

    lag: int = 0
    windows: int | None = None
    parts: int = 1
    release: bool = True
    order: Literal["flush", "counter with data"] = "flush"
    room: bool = True

    def __str__(self) -> str:
        return changed(self)


class Lookups:
    """The model for `explore`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.windows = settings.windows or settings.lag + 1

    def initial(self) -> State:
        return State(0, 0, Channel(), Channel())

    def steps(self, state: State) -> list[Step[State]]:
        asked, served, requests, responses = state
        rules = self.settings
        steps = [
            Step((verb, "requests", *which), state._replace(requests=channel), True)
            for verb, which, channel in moves(requests, rules.parts, rules.order)
        ]
        steps += [
            Step((verb, "responses", *which), state._replace(responses=channel), True)
            for verb, which, channel in moves(responses, rules.parts, rules.order)
        ]
        if state.arrived > 0:
            steps.append(Step(("consume",), State(asked - 1, served - 1, requests, responses), True))
        if state.askable > served and (not rules.room or responses.waiting < self.windows):
            steps.append(Step(("serve",), State(asked, served + 1, requests, posted(responses)), True))
        # Without the rule a client holds as many responses as it likes; twice the bound shows all that can go wrong.
        held = 0 if rules.release else min(state.arrived, rules.lag + 1)
        if asked - held <= rules.lag and (not rules.room or requests.waiting < self.windows):
            steps.append(Step(("ask",), State(asked + 1, served, posted(requests), responses), False))
        return steps

    def broken(self, state: State) -> str | None:
        limits = (
            # Of each direction: messages covered by the counter, and messages whose windows are free.
            ("request", state.requests, state.asked, state.askable, state.served),
            ("response", state.responses, state.served, state.arrived, 0),
        )
        for what, channel, count, covered, freed in limits:
            if channel.waiting > self.windows:
                return f"queue: a {what} is staged where another one has not left"
            message = count - channel.queued - len(channel.batch)
            for landed in channel.batch:
                if message - self.windows >= freed:
                    return f"overwrite: a {what} is put into a window that is still in use"
                there = channel.phase == COUNTING or 0 < landed == self.settings.parts
                if freed <= message < covered and not there:
                    return f"early read: a {what} may be read that is not all there"
                message += 1
        return None

    def settled(self, state: State) -> bool:
        return state == self.initial()

    def canonical(self, state: State) -> State:
        return state

    def unreduced(self) -> Lookups:
        return self

    def story(self, path: Sequence[tuple[Event, State]]) -> list[str]:
        return [
            f"{' '.join(map(str, event)):24} asked {s.asked}, served {s.served}, arrived {s.arrived}"
            for event, s in path
        ]
