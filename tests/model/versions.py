"""New versions of the tables as a model: owners that load them, and ranks that ask for them. No rows, no windows.

Written from the rules (blsrdma/native/versions.h), not from the code. Every rank but the last is an owner; the last one
only asks, so that no version of its own holds it back. What one rank tells another (an announcement, a request, that it
has moved on) is on its way for any time, and may be overtaken. `Settings.versions` are loaded, one after another.

    load      an owner puts its next version beside the one before, when there is a place for it, and announces it
    hear      a rank sees an announcement, or an owner that a rank has moved on
    adopt     a rank goes over to the version that it has seen announced by every owner that lives
    ask       a rank asks every owner for the version that it is at
    answer    an owner answers a request, from the version it names
    move      a rank whose asks of the version before are complete says so
    die       an owner dies, once at most; everybody learns of it
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from tests.model.explore import Event, Step
from tests.model.ranks import changed

if TYPE_CHECKING:
    from collections.abc import Sequence


class Rank(NamedTuple):
    at: int = 0  # the version it asks for
    said: int = 0  # the version it has moved on to, as it has told
    loaded: int = 0  # the newest of its own
    seen: tuple[int, ...] = ()  # of each owner: the newest version announced, as far as this rank has seen
    moved: tuple[int, ...] = ()  # of each rank: the version that it has moved on to, as far as this owner has seen
    asks: tuple[tuple[int, tuple[int, ...]], ...] = ()  # (version, owners that have not answered)


class State(NamedTuple):
    ranks: tuple[Rank, ...]
    dead: int = -1
    wrong: str = ""


@dataclass(frozen=True)
class Settings:
    """The rules as they are, or with a part of them broken.

    adopt     a version that all owners have announced; else that one has
    complete  a rank says that it has moved on when its older asks are complete; else at once
    wait      an owner loads a version when all have moved on to the one before; else when it has gone over itself
    """

    owners: int = 2
    versions: int = 2
    lag: int = 1
    deaths: bool = False
    adopt: Literal["all", "any"] = "all"
    complete: bool = True
    wait: bool = True

    def __str__(self) -> str:
        return changed(self)


class Versions:
    """The model for `explore`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.owners = range(settings.owners)
        self.count = settings.owners + 1

    def initial(self) -> State:
        rank = Rank(seen=(0,) * self.settings.owners, moved=(0,) * self.count)
        return State((rank,) * self.count)

    def steps(self, state: State) -> list[Step[State]]:
        steps: list[Step[State]] = []
        rules = self.settings

        def step(*event: str | int, certain: bool = True, wrong: str = "", **changes: Rank) -> None:
            ranks = list(state.ranks)
            for name, rank in changes.items():
                ranks[int(name[1:])] = rank
            steps.append(Step(event, State(tuple(ranks), state.dead, wrong), certain))

        for r, me in enumerate(state.ranks):
            if r == state.dead:
                continue
            for owner in self.owners:
                other = state.ranks[owner]
                if owner != state.dead and me.seen[owner] < other.loaded:
                    seen = (*me.seen[:owner], me.seen[owner] + 1, *me.seen[owner + 1 :])
                    step("hear", r, owner, **{f"_{r}": me._replace(seen=seen)})
            next_ = me.at + 1
            heard = [me.seen[owner] >= next_ for owner in self.owners if owner != state.dead]
            fits = r not in self.owners or me.loaded >= next_
            if me.said == me.at and fits and (all(heard) if rules.adopt == "all" else any(heard)):
                step("adopt", r, next_, **{f"_{r}": me._replace(at=next_)})
            older = [version for version, _ in me.asks if version < me.at]
            if me.said < me.at and not (older and rules.complete):
                step("move", r, **{f"_{r}": me._replace(said=me.at)})
            if len(me.asks) <= rules.lag:
                wanted = tuple(owner for owner in self.owners if owner != state.dead)
                step("ask", r, certain=False, **{f"_{r}": me._replace(asks=(*me.asks, (me.at, wanted)))})
            for n, (version, waiting) in enumerate(me.asks):
                for owner in waiting:
                    if owner == state.dead:
                        continue
                    # A place each for the newest and the one before; that is let go when the next is loaded.
                    has = state.ranks[owner].loaded
                    wrong = "" if version in (has, has - 1) else "an owner is asked for a version that it does not have"
                    left = tuple(one for one in waiting if one != owner)
                    asks = (*me.asks[:n], *([(version, left)] if left else []), *me.asks[n + 1 :])
                    step("answer", owner, r, version, wrong=wrong, **{f"_{r}": me._replace(asks=asks)})
        for owner in self.owners:
            me = state.ranks[owner]
            if owner == state.dead:
                continue
            for q, other in enumerate(state.ranks):
                if q != state.dead and me.moved[q] < other.said:
                    moved = (*me.moved[:q], other.said, *me.moved[q + 1 :])
                    step("hear", owner, q, **{f"_{owner}": me._replace(moved=moved)})
            all_moved = all(me.moved[q] >= me.loaded for q in range(self.count) if q != state.dead)
            if me.loaded < rules.versions and me.at == me.loaded and (all_moved or not rules.wait):
                step("load", owner, me.loaded + 1, **{f"_{owner}": me._replace(loaded=me.loaded + 1)})
        if rules.deaths and state.dead < 0:
            for owner in self.owners:
                ranks = []
                for rank in state.ranks:
                    asks = [(version, tuple(one for one in left if one != owner)) for version, left in rank.asks]
                    ranks.append(rank._replace(asks=tuple(ask for ask in asks if ask[1])))
                steps.append(Step(("die", owner), State(tuple(ranks), owner), False))
        return steps

    def broken(self, state: State) -> str | None:
        return state.wrong or None

    def settled(self, state: State) -> bool:
        """Everybody who lives is at the newest version, and says so."""
        newest = self.settings.versions
        return all(rank.said == newest and not rank.asks for r, rank in enumerate(state.ranks) if r != state.dead)

    def canonical(self, state: State) -> State:
        asks = [rank._replace(asks=tuple(sorted(rank.asks))) for rank in state.ranks]
        return State(tuple(asks), state.dead, state.wrong)

    def unreduced(self) -> Versions:
        return self

    def story(self, path: Sequence[tuple[Event, State]]) -> list[str]:
        return [
            f"{' '.join(map(str, event)):16} {[(r.at, r.said, r.loaded, r.asks) for r in s.ranks]}" for event, s in path
        ]
