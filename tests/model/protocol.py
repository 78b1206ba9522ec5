"""The bounded-lag exchange as a model: what is posted, put, counted, released, and what a crash leaves behind.

Written from the rules, not from the code. One state is everything that matters at one moment; `Protocol.steps` says
what can happen next, one event at a time, in any order:

    post       a rank posts its next iteration to everyone, when the lag rules allow it
    release    a rank releases any iteration it has posted, read or not
    take       a sender takes all that is queued for one peer and issues the puts (a batch)
    land       one part of one message arrives; parts are unordered, and until all are there the window is undefined
    flush      all puts of a batch have landed: only now are the headers put, each with a counter
    counter    a header lands; the receiver sees messages up to the first whose header has not
    complete   the header puts are complete at their sender, before or after they land: the next batch may be taken
    crash      a rank dies, at any moment; what it had in flight lands later or never
    fail       a survivor notices, at any later moment, and raises; what others had sent it still lands
    free       a survivor that failed gives its windows' memory to something else

What is abstracted, and why nothing is lost:

* Iterations have no numbers. Rules and windows depend on differences only (window i mod W; renaming the windows in a
  circle changes nothing), so a rank's next iteration is counted from the slowest rank's, and a channel's positions
  backwards from its sender's next. Differences are bounded by the lag, so the states are finitely many *although the
  iterations are not*: there is no bound on them, and every window is used again and again.
* The content of a window follows from the channel's state: what is in flight is undefined, what a counter covers is
  there, what was put later is gone. So an overwrite is not seen where the bytes change but already where a put *may*
  change them: any number of parts, in any order, of any size.
* Reading is not an event. A message may be read at every moment from complete until released, so it has to be intact
  in every such state.
* With parts = 0 a batch lands at once; until then every window of it is undefined, which covers every order of landing.
* Direct stores are a special case: take, land and counter follow the post in order, and nothing lands after a crash.
* A rank that is slow or stopped is one whose events do not happen for a while: every interleaving has them.

Not modelled: times and deadlines, torn counters (the check word), farewells and close, a new incarnation (epochs), a
message to oneself, messages larger than a window (pull.py).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from tests.model.channel import COUNTING, Channel, moves, posted
from tests.model.explore import Event, Step
from tests.model.ranks import Ranks, advanced, changed, put
from tests.model.story import tell

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.model.ranks import State as Ranked

ALIVE, CRASHED, FAILED, FREED = "alive", "crashed", "failed", "freed"


class State(NamedTuple):
    next: tuple[int, ...]  # per rank: the iteration it posts next, counted from the slowest
    held: tuple[int, ...]  # per rank, a bit per iteration posted and not released: bit j is iteration next - 1 - j
    status: tuple[str, ...]
    channels: tuple[Channel, ...]


@dataclass(frozen=True)
class Settings:
    """One model: the rules as they are, or with one of them broken.

    ranks, lag
    windows     per source; None: as many as the rule asks for
    parts       of each message; 0: see the module
    doomed      how many of the ranks may crash
    order       headers are put only after a flush, when the batch has landed; or a counter is put at once with the
                data, unordered
    completion  iteration i is posted only when i - lag - 1 is complete
    releases    and released
    room        a message is queued only when the one `windows` before it has left
    blame       who notices a crash: everyone, always; or only a rank for which the dead one is behind in the oldest
                iteration that it lacks
    quarantine  memory that a dead rank may still write into is never used again

    `eager` leaves out interleavings that cannot matter: an event that disables nothing and commutes with all others may
    as well happen at once.
        nothing   all interleavings
        local     flush and complete, which no other rank sees, happen at once (hides a queue that is too short)
        arrivals  so do take, land and counter; only a counter of a rank that may crash comes at any time or never. Any
                  run can be reordered so: posts and releases stay possible where they were, so that what a put may
                  overwrite, the lead, and where ranks get stuck are the same
        releases  so do releases: for crashes and deadlocks only (hides overwrites)
    """

    ranks: int = 2
    lag: int = 0
    windows: int | None = None
    parts: int = 1
    doomed: int = 0
    order: Literal["flush", "counter with data"] = "flush"
    completion: bool = True
    releases: bool = True
    room: bool = True
    blame: Literal["always", "behind"] = "always"
    quarantine: bool = True
    eager: Literal["nothing", "local", "arrivals", "releases"] = "nothing"

    def __str__(self) -> str:
        return changed(self)


class Protocol:
    """The model for `explore`."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.ranks = Ranks(settings.ranks, settings.doomed)
        self.pairs = self.ranks.pairs
        self.windows = settings.windows or 2 * (settings.lag + 1)
        local, arrivals = {"flush", "complete"}, {"flush", "complete", "take", "land"}
        early = {"nothing": set(), "local": local, "arrivals": arrivals, "releases": arrivals}[settings.eager]
        counter = {"counter"} if "take" in early else set()
        self.eager = [early | (counter if s >= settings.doomed else set()) for s, _ in self.pairs]

    def initial(self) -> State:
        ranks = self.settings.ranks
        return State((0,) * ranks, (0,) * ranks, (ALIVE,) * ranks, (Channel(),) * len(self.pairs))

    # --- what can happen

    def steps(self, state: State) -> list[Step[State]]:
        steps = []
        parts, order = self.settings.parts, self.settings.order
        next_, held, status, channels = state
        for c, (source, sink) in enumerate(self.pairs):
            dead = status[source] == CRASHED
            if status[sink] == CRASHED:
                continue  # the puts go nowhere, which nobody feels
            for verb, which, channel in moves(channels[c], parts, order):
                if dead and verb not in ("land", "counter"):
                    continue  # these are the sender's own
                after = State(next_, held, status, (*channels[:c], channel, *channels[c + 1 :]))
                step = Step((verb, source, sink, *which), after, not dead)
                if verb in self.eager[c]:
                    return [step]
                steps.append(step)
        # The slowest first: so the first certain step of each state leads to a settled one.
        for rank in sorted(range(len(next_)), key=lambda r: (not held[r], next_[r])):
            is_now = status[rank]
            if is_now == ALIVE:
                own = self._of_rank(state, rank)
                if self.settings.eager == "releases" and held[rank]:
                    return own[:1]
                steps += own
            elif is_now == FAILED and self._frees(state, rank):
                steps.append(Step(("free", rank), state._replace(status=put(status, rank, FREED)), False))
        return steps

    def _of_rank(self, state: State, rank: int) -> list[Step[State]]:
        next_, held, status, channels = state
        steps = []
        mine = held[rank]
        for j in reversed(range(mine.bit_length())):
            if mine >> j & 1:
                after = State(next_, put(held, rank, mine & ~(1 << j)), status, channels)
                steps.append(Step(("release", rank, j + 1), after, True))
        if CRASHED in status and (self.settings.blame == "always" or self._blames(state, rank)):
            steps.append(Step(("fail", rank), state._replace(status=put(status, rank, FAILED)), True))
        if self.may_post(state, rank):
            now = list(channels)
            for c in self.ranks.outgoing[rank]:
                if status[self.pairs[c][1]] != CRASHED:  # what is put to the dead goes nowhere
                    now[c] = posted(channels[c])
            after = State(advanced(next_, rank), put(held, rank, mine << 1 | 1), status, tuple(now))
            steps.append(Step(("post", rank), after, True))
        if rank < self.settings.doomed:
            gone = [Channel() if self.pairs[c][1] == rank else channel for c, channel in enumerate(channels)]
            after = State(next_, put(held, rank, 0), put(status, rank, CRASHED), tuple(gone))
            steps.append(Step(("crash", rank), after, False))
        return steps

    # --- the rules

    def may_begin(self, state: State, rank: int) -> bool:
        return self.ranks.complete(state, rank) > state.next[rank] - self.settings.lag - 1

    def may_post(self, state: State, rank: int) -> bool:
        rules = self.settings
        if rules.releases and state.held[rank] >> rules.lag:
            return False
        if rules.completion and not self.may_begin(state, rank):
            return False
        return not rules.room or all(state.channels[c].waiting < self.windows for c in self.ranks.outgoing[rank])

    def _blames(self, state: State, rank: int) -> bool:
        """Whether a dead rank is behind in the oldest iteration that `rank` lacks and has to wait for."""
        lacks = self.ranks.complete(state, rank)
        return lacks < state.next[rank] and any(
            self.ranks.counted(state, c) <= lacks and state.status[self.pairs[c][0]] == CRASHED
            for c in self.ranks.incoming[rank]
        )

    def _frees(self, state: State, rank: int) -> bool:
        """Whether all who may write to `rank` have parted, and nothing of theirs is in flight; without quarantine a
        dead rank counts as parted."""
        for c in self.ranks.incoming[rank]:
            is_now, channel = state.status[self.pairs[c][0]], state.channels[c]
            if is_now == CRASHED and not self.settings.quarantine:
                continue
            if is_now not in (FAILED, FREED) or channel.queued or channel.writes:
                return False
        return True

    # --- what must hold

    def broken(self, state: State) -> str | None:
        lag, next_, status = self.settings.lag, state.next, state.status
        complete = [self.ranks.complete(state, rank) for rank in range(len(next_))]
        slowest = min(next_)
        for rank, n in enumerate(next_):
            working = n if complete[rank] > n - lag - 1 else n - 1
            if status[rank] == ALIVE and working - slowest > lag:
                return f"lead: rank {rank} works on an iteration {working - slowest} ahead of the slowest, lag {lag}"
        for (source, sink), channel in zip(self.pairs, state.channels, strict=True):
            if channel.waiting > self.windows:
                return f"queue: rank {source} reuses a slot of its queue to rank {sink} before the put has left it"
            if status[sink] == FREED and channel.writes:
                return f"late put: rank {source} may still write into memory that rank {sink} has given away"
            if status[sink] == CRASHED:
                continue
            message = next_[source] - channel.queued - len(channel.batch)
            for landed in channel.batch:
                if not self.ranks.released(state, sink, message - self.windows):
                    return f"overwrite: rank {source} puts into a window that rank {sink} has not released"
                there = channel.phase == COUNTING or 0 < landed == self.settings.parts
                readable = message < min(complete[sink], next_[sink])
                if not there and readable and not self.ranks.released(state, sink, message):
                    return f"early read: rank {sink} may read a message of rank {source} that is not all there"
                message += 1
        return None

    def settled(self, state: State) -> bool:
        """All is calm: everyone has posted the same iterations, and all is delivered and released (every later start of
        a run looks like this one). After a crash: every survivor has failed."""
        if CRASHED in state.status:
            return ALIVE not in state.status
        return not any(state.next) and not any(state.held) and all(c == Channel() for c in state.channels)

    # --- for the explorer

    def canonical(self, state: State) -> State:
        columns, channels = self.ranks.least([state.next, state.status, state.held], state.channels)
        return State(columns[0], columns[2], columns[1], channels)

    def unreduced(self) -> Protocol:
        return Protocol(replace(self.settings, eager="nothing"))

    def story(self, path: Sequence[tuple[Event, State]]) -> list[str]:
        def batch(state: Ranked, channel: int, end: int) -> str:
            queued = cast("State", state).channels[channel].queued
            return "puts " + ", ".join(f"{i} into window {i % self.windows}" for i in range(end - queued, end))

        return tell(self.ranks, self.initial(), path, batch)
