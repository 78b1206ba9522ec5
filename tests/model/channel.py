"""One channel of the model in protocol.py: what one rank has posted to one other, and how far it has got.

A batch is what the sender takes from the queue at once. Its puts are unordered among themselves. When they have landed,
the headers are put, each with the counter of its message, unordered too: the receiver sees a message when its header
and those of all earlier messages are there. (A sender that stores, which does everything in order, is a special case.)
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

IDLE, MOVING, COUNTING = "idle", "moving", "counting"


class Channel(NamedTuple):
    """Positions are counted backwards from the sender's next iteration."""

    queued: int = 0  # posted and not taken yet
    batch: tuple[int, ...] = ()  # of each message under way, the oldest first: the parts that have landed
    phase: str = IDLE
    behind: int = 0  # messages that the receiver does not see
    flying: tuple[int, ...] = ()  # the headers in flight; with order "counter with data", the counters

    @property
    def waiting(self) -> int:
        """Messages whose puts are not known to be complete: they need their slots of the queue."""
        return self.queued + len(self.batch)

    @property
    def writes(self) -> bool:
        """Whether a put that has been issued may still land."""
        return bool(self.batch or self.flying)


class Move(NamedTuple):
    verb: str
    which: tuple[int, ...]  # the message, header or counter, counted backwards, and the part
    channel: Channel  # afterwards


@cache
def moves(channel: Channel, parts: int, order: str) -> tuple[Move, ...]:
    """What can happen next; `order` is Settings.order of protocol.py."""
    queued, batch, phase, behind, flying = channel
    possible = []
    early = order == "counter with data"
    if phase == MOVING and all(landed == parts for landed in batch):
        if not early:
            headers = tuple(range(queued + len(batch), queued, -1))
            possible.append(Move("flush", (), Channel(queued, batch, COUNTING, behind, (*flying, *headers))))
        elif not flying:
            possible.append(Move("flush", (), Channel(queued, (), IDLE, behind)))
    if phase == COUNTING:
        possible.append(Move("complete", (), Channel(queued, (), IDLE, behind, flying)))
    for f, which in enumerate(flying):
        rest = flying[:f] + flying[f + 1 :]
        unwritten = queued + len(batch) * (phase == MOVING)
        possible.append(
            Move("counter", (which,), Channel(queued, batch, phase, which if early else max((*rest, unwritten)), rest))
        )
    if phase == MOVING:
        for m, landed in enumerate(batch):
            if landed < parts:
                more = (*batch[:m], landed + 1, *batch[m + 1 :])
                possible.append(Move("land", (queued + len(batch) - m, landed + 1), channel._replace(batch=more)))
    if phase == IDLE and queued and not (flying and early):
        counters = (0,) if early else flying
        possible.append(Move("take", (), Channel(0, (0,) * queued, MOVING, behind, counters)))
    return tuple(possible)


@cache
def posted(channel: Channel) -> Channel:
    """After its sender has posted one more: all positions are one further back."""
    queued, batch, phase, behind, flying = channel
    return Channel(queued + 1, batch, phase, behind + 1, tuple([counter + 1 for counter in flying]))
