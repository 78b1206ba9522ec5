"""Messages larger than a window, as a model: the window brings {address, length}, the receiver pulls the payload.

The windows themselves are taken for granted (protocol.py): what a sender has posted becomes visible in order, at any
later moment, and stays until it is released. Every message here is a large one. An event at a time, in any order:

    post      a rank posts; its application has `buffers` send buffers and uses them in turn
    counter   one more message of a sender, that is its {address, length}, is visible at a receiver
    wait      the application calls wait(i) and is stuck in it until it returns
    get       the receiver starts to read the sender's buffer; got: the payload is all there
    return    wait(i) returns: every payload of i is there
    release   the application releases i; if it has not waited for it, the payload is not wanted
    pulled    the sender sees the receiver's `pulled` counter: its messages up to there are not needed any more
    ask       the application loops until sent(i): everyone has pulled its message of i; sent: it leaves the loop
    crash, fail   as in protocol.py; a get from a dead rank may never end

An application is any program of these calls, as wild as `Settings` lets it be; in particular, both directions pull at
once, or a rank pulls while its peer computes. The get needs the peer's process (its progress thread), never a call of
its application. That the application overwrites its buffer is not an event: from sent(i) on it may, at any moment.

Iterations have no numbers, as in protocol.py: the states are finitely many, the iterations are not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

from tests.model.explore import Event, Step
from tests.model.pulls import DONE, READING, UNTOUCHED, Pulls
from tests.model.ranks import Ranks, advanced, changed, put
from tests.model.story import tell

if TYPE_CHECKING:
    from collections.abc import Sequence

ALIVE, CRASHED, FAILED = "alive", "crashed", "failed"


class App(NamedTuple):
    call: str = ""  # "wait" or "ask", and of which iteration, counted backwards from the rank's next
    age: int = 0


class State(NamedTuple):
    next: tuple[int, ...]
    held: tuple[int, ...]  # a bit per iteration posted and not released, as in protocol.py
    waited: tuple[int, ...]  # of these: those whose wait has returned
    status: tuple[str, ...]
    apps: tuple[App, ...]
    channels: tuple[Pulls, ...]


@dataclass(frozen=True)
class Settings:
    """One model: rules of the exchange, and what the application may do.

    buffers  the application has; None: lag + 1
    doomed   how many of the ranks may crash
    acks     what makes sent() true. "in order": a counter of the messages pulled without a gap. "newest": a counter of
             the newest message pulled. "left": that the put into the window is complete, as for a small message
    unread   when a message that was released without having been waited for counts as pulled: at its "release"; only
             at the "post" of i + lag + 1; or "never"
    pulls    where payloads are pulled: in "wait", of the iteration that is waited for; in "calls", that is there and,
             of every iteration that is here, in the loop for sent(); or in the "background"
    failed   what an application may do with its send buffers once its exchange has failed: "keep" or "reuse" them
    waits    in which order the application waits: "any"; "in turn", the oldest first, where a released one needs no
             wait; "when due", only for i - lag - 1 before it posts i, and it releases nothing unread
    asks     for sent(i) the application loops at "any" time; or only "after wait": when it has waited for i and all
             before it, or released them
    """

    ranks: int = 2
    lag: int = 0
    buffers: int | None = None
    doomed: int = 0
    acks: Literal["in order", "newest", "left"] = "in order"
    unread: Literal["release", "post", "never"] = "release"
    pulls: Literal["wait", "calls", "background"] = "wait"
    failed: Literal["keep", "reuse"] = "keep"
    waits: Literal["any", "in turn", "when due"] = "in turn"
    asks: Literal["any", "after wait"] = "after wait"

    def __str__(self) -> str:
        return changed(self)


class Pull:
    """The model for `explore`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.ranks = Ranks(settings.ranks, settings.doomed)
        self.pairs = self.ranks.pairs
        self.buffers = settings.buffers or settings.lag + 1

    def initial(self) -> State:
        ranks = self.settings.ranks
        empty = (0,) * ranks
        return State(empty, empty, empty, (ALIVE,) * ranks, (App(),) * ranks, (Pulls(),) * len(self.pairs))

    # --- what can happen

    def steps(self, state: State) -> list[Step[State]]:
        steps = []
        for c, (source, sink) in enumerate(self.pairs):
            alive = state.status[source] != CRASHED
            for verb, age, pulls in self._of_pair(state, c):
                certain = alive if verb != "pulled" else state.status[sink] != CRASHED
                steps.append(
                    Step((verb, source, sink, age), state._replace(channels=put(state.channels, c, pulls)), certain)
                )
        for rank in sorted(range(self.settings.ranks), key=lambda r: (not state.held[r], state.next[r])):
            if state.status[rank] == ALIVE:
                steps += self._of_app(state, rank)
                if CRASHED in state.status:
                    after = state._replace(status=put(state.status, rank, FAILED), apps=put(state.apps, rank, App()))
                    steps.append(Step(("fail", rank), after, True))
                if rank < self.settings.doomed:
                    steps.append(Step(("crash", rank), self._crashed(state, rank), False))
        return steps

    def _of_pair(self, state: State, c: int) -> list[tuple[str, int, Pulls]]:
        """Verb, age of the message, the channel afterwards."""
        source, sink = self.pairs[c]
        pulls = state.channels[c]
        moves = []
        if state.status[sink] != CRASHED:
            if pulls.behind:
                moves.append(("counter", pulls.behind - 1, pulls._replace(behind=pulls.behind - 1)))
            for age in range(len(pulls.stages), 0, -1):
                if pulls.stage(age) == READING:
                    moves.append(("got", age, pulls.staged(age, DONE)))
                elif pulls.stage(age) == UNTOUCHED and self._may_get(state, c, state.next[source] - age):
                    moves.append(("get", age, pulls.staged(age, READING)))
        count = pulls.not_needed(self.settings.acks)
        if count > pulls.told and state.status[source] != CRASHED:
            moves.append(("pulled", len(pulls.stages) - count, pulls.tell(count)))
        return moves

    def _may_get(self, state: State, c: int, iteration: int) -> bool:
        sink = self.pairs[c][1]
        if state.status[sink] != ALIVE or self.ranks.released(state, sink, iteration):
            return False
        if self.settings.pulls == "background":
            return self.ranks.counted(state, c) > iteration
        call, age = state.apps[sink]
        if call == "ask" and self.settings.pulls == "calls":
            return iteration < self.ranks.complete(state, sink)
        return call == "wait" and state.next[sink] - age == iteration < self.ranks.complete(state, sink)

    def _of_app(self, state: State, rank: int) -> list[Step[State]]:
        rules, held, waited = self.settings, state.held[rank], state.waited[rank]
        call, age = state.apps[rank]
        free = put(state.apps, rank, App())
        if call == "wait":
            if not self._returns(state, rank, state.next[rank] - age):
                return []
            after = state._replace(apps=free, waited=put(state.waited, rank, waited | 1 << age - 1))
            return [Step(("return", rank, age), after, True)]
        if call == "ask":
            sent = self._sent(state, rank, state.next[rank] - age)
            return [Step(("sent", rank, age), state._replace(apps=free), True)] if sent else []
        steps = []
        for j in reversed(range(rules.lag + 1)):
            if not held >> j & 1:
                continue
            if not waited >> j & 1:
                if self._may_wait(held, waited, j):
                    after = state._replace(apps=put(state.apps, rank, App("wait", j + 1)))
                    steps.append(Step(("wait", rank, j + 1), after, True))
                if rules.waits == "when due":
                    continue
            steps.append(Step(("release", rank, j + 1), self._after_release(state, rank, j), True))
        if self._may_post(state, rank):
            steps.append(Step(("post", rank), self._after_post(state, rank), True))
        for j in range(self.buffers):
            may_ask = rules.asks == "any" or not (held & ~waited) >> j
            if may_ask and not self._sent(state, rank, state.next[rank] - 1 - j):
                after = state._replace(apps=put(state.apps, rank, App("ask", j + 1)))
                steps.append(Step(("ask", rank, j + 1), after, True))
        return steps

    def _may_post(self, state: State, rank: int) -> bool:
        lag, n = self.settings.lag, state.next[rank]
        begun = self.ranks.complete(state, rank) > n - lag - 1
        return begun and not state.held[rank] >> lag and self._sent(state, rank, n - self.buffers)

    def _may_wait(self, held: int, waited: int, j: int) -> bool:
        if self.settings.waits == "when due":
            return j == self.settings.lag
        return self.settings.waits == "any" or not (held & ~waited) >> j + 1

    def _after_post(self, state: State, rank: int) -> State:
        channels = list(state.channels)
        if self.settings.unread == "post":
            self._drop(state, channels, rank, state.next[rank] - self.settings.lag - 1)
        for c in self.ranks.outgoing[rank]:
            sink = self.pairs[c][1]
            unwanted = self.settings.unread == "release" and self.ranks.released(state, sink, state.next[rank])
            channels[c] = channels[c].posted(unwanted)
            if state.status[sink] == CRASHED:
                channels[c] = channels[c]._replace(behind=0)
        held, waited = state.held[rank] << 1 | 1, state.waited[rank] << 1
        return state._replace(
            next=advanced(state.next, rank),
            held=put(state.held, rank, held),
            waited=put(state.waited, rank, waited),
            channels=tuple(channels),
        )

    def _after_release(self, state: State, rank: int, j: int) -> State:
        channels = list(state.channels)
        if self.settings.unread == "release":
            self._drop(state, channels, rank, state.next[rank] - 1 - j)
        kept = ~(1 << j)
        return state._replace(
            held=put(state.held, rank, state.held[rank] & kept),
            waited=put(state.waited, rank, state.waited[rank] & kept),
            channels=tuple(channels),
        )

    def _drop(self, state: State, channels: list[Pulls], rank: int, iteration: int) -> None:
        """What `rank` has not begun to pull of an iteration it does not want."""
        for c in self.ranks.incoming[rank]:
            age = self._age(state, c, iteration)
            if age > 0 and channels[c].stage(age) == UNTOUCHED:
                channels[c] = channels[c].staged(age, DONE)

    def _crashed(self, state: State, rank: int) -> State:
        gone = [p._replace(behind=0) if self.pairs[c][1] == rank else p for c, p in enumerate(state.channels)]
        return state._replace(
            held=put(state.held, rank, 0),
            waited=put(state.waited, rank, 0),
            apps=put(state.apps, rank, App()),
            status=put(state.status, rank, CRASHED),
            channels=tuple(gone),
        )

    # --- the rules

    def _age(self, state: State, c: int, iteration: int) -> int:
        return state.next[self.pairs[c][0]] - iteration

    def _sent(self, state: State, rank: int, iteration: int) -> bool:
        return all(state.channels[c].free(self._age(state, c, iteration)) for c in self.ranks.outgoing[rank])

    def _returns(self, state: State, rank: int, iteration: int) -> bool:
        """Whether all payloads of an iteration are here."""
        return iteration < self.ranks.complete(state, rank) and all(
            state.channels[c].stage(self._age(state, c, iteration)) == DONE for c in self.ranks.incoming[rank]
        )

    # --- what must hold

    def broken(self, state: State) -> str | None:
        for c, (source, sink) in enumerate(self.pairs):
            if state.status[sink] == CRASHED:
                continue
            reuses = self.settings.failed == "reuse" and state.status[source] == FAILED
            for age in range(1, len(state.channels[c].stages) + 1):
                stage = state.channels[c].stage(age)
                if stage != DONE and self._sent(state, source, state.next[source] - age):
                    return f"send buffer: rank {source} may overwrite what rank {sink} has not pulled"
                if stage == READING and reuses and state.status[sink] == ALIVE:
                    return f"send buffer: rank {source} has failed and overwrites what rank {sink} is pulling"
        return None

    def settled(self, state: State) -> bool:
        """Everyone has posted the same iterations, all is delivered, pulled and released (where waits come only when
        due: but the last `lag` ones), and all can go on. After a crash: every survivor has failed."""
        if CRASHED in state.status:
            return ALIVE not in state.status
        rules, ranks = self.settings, range(self.settings.ranks)
        left = rules.lag if rules.waits == "when due" else 0
        calm = Pulls(0, (UNTOUCHED,) * left if rules.pulls != "background" else ())
        return (
            not any(state.next)
            and not any(state.waited)
            and all(held == (1 << left) - 1 for held in state.held)
            and all(app == App() for app in state.apps)
            and all(pulls == calm for pulls in state.channels)
            and all(self._may_post(state, rank) for rank in ranks)
        )

    # --- for the explorer

    def canonical(self, state: State) -> State:
        (next_, held, waited, status, apps), channels = self.ranks.least(list(state[:-1]), state.channels)
        return State(next_, held, waited, status, apps, channels)

    def unreduced(self) -> Pull:
        return self

    def story(self, path: Sequence[tuple[Event, State]]) -> list[str]:
        return tell(self.ranks, self.initial(), path)
