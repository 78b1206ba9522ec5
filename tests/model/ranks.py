"""What the models of protocol.py and pull.py share: ranks, the channels between them, who has completed what."""

from __future__ import annotations

from dataclasses import fields
from itertools import permutations
from typing import Any, Protocol

Columns = list[tuple[Any, ...]]  # each with one value per rank


class Channel(Protocol):
    @property
    def behind(self) -> int:
        """The counter that the receiver sees, counted backwards from the sender's next iteration."""


class State(Protocol):
    @property
    def next(self) -> tuple[int, ...]:
        """Per rank: the iteration it posts next, counted from the slowest rank's."""

    @property
    def held(self) -> tuple[int, ...]:
        """Per rank, a bit per iteration posted and not released: bit j is iteration next - 1 - j."""

    @property
    def status(self) -> tuple[str, ...]:
        """Per rank: alive, crashed, failed ..."""

    @property
    def channels(self) -> tuple[Channel, ...]:
        """Per pair of ranks."""


class Ranks:
    """The ranks 0 .. count - 1 and the ordered pairs of them. The first `doomed` ones may crash.

    Ranks that run the same program are interchangeable: of all states that differ in names only, one is explored.
    """

    def __init__(self, count: int, doomed: int) -> None:
        ranks = range(count)
        self.doomed = doomed
        self.pairs = [(s, d) for s in ranks for d in ranks if s != d]
        self.index = {pair: p for p, pair in enumerate(self.pairs)}
        self.outgoing = [[p for p, (s, _) in enumerate(self.pairs) if s == r] for r in ranks]
        self.incoming = [[p for p, (_, d) in enumerate(self.pairs) if d == r] for r in ranks]
        # names[new] = old, and where each pair's value comes from
        self.renamings = {
            names: [self.index[names[s], names[d]] for s, d in self.pairs]
            for names in permutations(ranks)
            if all((names[r] < doomed) == (r < doomed) for r in ranks)
        }

    def least(self, columns: Columns, channels: tuple[Any, ...]) -> tuple[Columns, tuple[Any, ...]]:
        """The representative: the ranks sorted by their values; then the least by those of the channels."""
        if len(self.renamings) == 1:
            return columns, channels
        signs = [(r >= self.doomed, *sign) for r, sign in enumerate(zip(*columns, strict=True))]
        names = tuple(sorted(range(len(signs)), key=signs.__getitem__))
        order = [signs[old] for old in names]
        if len(set(signs)) == len(signs):
            least = tuple([channels[p] for p in self.renamings[names]])
        else:  # ranks that look alike may still be told apart by what lies between them and others
            alike = (where for names, where in self.renamings.items() if [signs[old] for old in names] == order)
            least = min(tuple([channels[p] for p in where]) for where in alike)
        return [tuple([column[r] for r in names]) for column in columns], least

    def counted(self, state: State, channel: int) -> int:
        """Messages up to this one, exclusive, are there: the receiver's view of the counter."""
        return state.next[self.pairs[channel][0]] - state.channels[channel].behind

    def complete(self, state: State, rank: int) -> int:
        """Iterations below this one are complete at `rank`."""
        return min([self.counted(state, c) for c in self.incoming[rank]])

    def released(self, state: State, rank: int, iteration: int) -> bool:
        """Whether `rank` has posted and released it."""
        age = state.next[rank] - 1 - iteration
        return age >= 0 and not state.held[rank] >> age & 1


def changed(settings: Any) -> str:
    """What a dataclass of settings says: the fields that are not at their defaults."""
    values = [(field, getattr(settings, field.name)) for field in fields(settings)]
    return ", ".join(f"{field.name}={value}" for field, value in values if value != field.default) or "defaults"


def advanced(next_: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """After a post: counted from the slowest rank again."""
    ahead = put(next_, rank, next_[rank] + 1)
    slowest = min(ahead)
    return tuple([n - slowest for n in ahead])


def put(items: tuple[Any, ...], at: int, item: object) -> tuple[Any, ...]:
    """`items` with another one at one place."""
    return (*items[:at], item, *items[at + 1 :])
