"""The large messages from one rank to one other in the model of pull.py, and how far the receiver has pulled them."""

from __future__ import annotations

from typing import NamedTuple

UNTOUCHED, READING, DONE = 0, 1, 2


class Pulls(NamedTuple):
    """Positions are counted backwards from the sender's next iteration: its last message has age 1."""

    behind: int = 0  # the counter that the receiver sees
    stages: tuple[int, ...] = ()  # of the messages that the sender has to keep, the oldest first
    told: int = 0  # the sender was told that so many of them are not needed: above 0 only where a rule is broken

    def stage(self, age: int) -> int:
        """Of the message of this age; a message not posted yet has the age 0 or less and is untouched."""
        at = len(self.stages) - age
        return DONE if at < 0 else self.stages[at] if age > 0 else UNTOUCHED

    def free(self, age: int) -> bool:
        """Whether the sender believes that it need not keep the message of this age."""
        return len(self.stages) - age < self.told

    def posted(self, unwanted: bool) -> Pulls:
        return Pulls(self.behind + 1, (*self.stages, DONE if unwanted else UNTOUCHED), self.told)

    def staged(self, age: int, stage: int) -> Pulls:
        at = len(self.stages) - age
        return self._replace(stages=(*self.stages[:at], stage, *self.stages[at + 1 :]))

    def not_needed(self, acks: str) -> int:
        """How many messages the sender need not keep, as its acknowledgements say; see Settings.acks in pull.py."""
        if acks == "left":
            return len(self.stages) - self.behind
        pulled = [m + 1 for m, stage in enumerate(self.stages) if stage == DONE]
        if acks == "newest":
            return max(pulled, default=0)
        return sum(m == count for count, m in enumerate(pulled, 1))

    def tell(self, count: int) -> Pulls:
        """The sender hears of it, and forgets what nobody needs."""
        first = 0
        while first < count and self.stages[first] == DONE:
            first += 1
        return Pulls(self.behind, self.stages[first:], count - first)
