"""A run of a model in words, with the iterations' real numbers, which its states do not have."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tests.model.explore import Event
    from tests.model.ranks import Ranks, State

# verb -> what to print of it: {i} is the iteration that its first number means
WORDS = {
    "post": "posts {i}",
    "release": "releases {i}",
    "crash": "crashes",
    "fail": "fails",
    "free": "gives its windows' memory to something else",
    "wait": "calls wait({i})",
    "return": "wait({i}) returns",
    "ask": "loops until sent({i})",
    "sent": "sees sent({i})",
}
WORDS_OF_CHANNEL = {
    "land": "part {part} of {i} lands",
    "counter": "counter {i} is visible",
    "get": "{i} is being pulled",
    "got": "{i} has been pulled",
    "pulled": "the sender is told that messages below {i} are not needed",
}


def tell(
    ranks: Ranks,
    initial: State,
    path: Sequence[tuple[Event, State]],
    batch: Callable[[State, int, int], str] = lambda state, channel, end: "",
) -> list[str]:
    """One line per event, and at the end one per rank. `batch` says what a sender takes from its queue."""
    lines = []
    base = 0  # the slowest rank's next iteration
    state = initial
    for (verb, *numbers), after in path:
        verb, rank, *rest = str(verb), *(int(each) for each in numbers)
        end = base + state.next[rank]
        if verb in WORDS:
            lines.append(f"rank {rank}: " + WORDS[verb].format(i=end - sum(rest[:1])))
        else:
            sink, *which = rest
            words = WORDS_OF_CHANNEL.get(verb) or (verb if verb != "take" else "")
            words = words.format(i=end - sum(which[:1]), part=sum(which[1:]))
            lines.append(f"rank {rank} to {sink}: " + (words or batch(state, ranks.index[rank, sink], end)))
        if verb == "post":
            base += state.next[rank] + 1 - after.next[rank]
        state = after
    for rank, n in enumerate(state.next):
        end, held = base + n, state.held[rank]
        unreleased = [end - 1 - j for j in reversed(range(held.bit_length())) if held >> j & 1]
        complete = base + ranks.complete(state, rank)
        view = f"next is {end}, complete below {complete}, unreleased {unreleased}"
        lines.append(f"=> rank {rank}: {view if state.status[rank] != 'crashed' else 'crashed'}")
    return lines
