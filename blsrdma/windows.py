"""Where the windows lie: pure arithmetic, no I/O.

One arena per rank, registered with UCX, that its peers write into::

    token             64 bytes, random: proves to a peer that what it mapped is this arena
    sleeper           64 bytes, a word: the owner sleeps and wants to be woken
    control blocks    512 bytes per rank: what that rank tells this one by counters, and its farewell
    windows           per source, `windows` of them: [guard] header (64) payload [guard]
    staging           per destination: the local sources of this rank's own counter, farewell, header and address puts

**How many windows per source.** Let a rank post i only when it holds every peer's counter of i - a, and only when it
has released its own windows up to i - b. When p posts i it holds q's counter of i - a; q posted i - a, so q had
released i - a - b. Putting i into the window that held i - W is therefore safe, with no acknowledgement at all, iff
W >= a + b. A bounded-lag rank begins i when i - lag - 1 is complete and posts i when i - lag - 1 is released:
a = b = lag + 1, so W = 2 (lag + 1), the double buffer of a synchronous collective at lag 0.

The other choice, W = lag + 1 windows and a *released* counter from each receiver to each sender, halves the memory and
costs one more put per pair and iteration, which an idle receiver must send by itself or everyone deadlocks. Messages
here are small (a block of embedding rows), latency is what counts, and a rule that needs no message cannot lose one:
so 2 (lag + 1).

**Messages larger than a window** stay where they are: the window gets their address, and the receiver pulls them. The
sender's buffer is then in use until the receiver has published, by a counter, that it has pulled them.
"""

from __future__ import annotations

from dataclasses import dataclass

LINE_BYTES = 64
CONTROL_BYTES = 512
HEADER_BYTES = 64
LEAST_PAYLOAD = 512  # of a window, however small its messages: a large message leaves its address here
STAGING_BYTES = 1024


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def windows_needed(lag: int) -> int:
    """Windows per source that make reuse safe without acknowledgements; the module's docstring has the proof."""
    return 2 * (lag + 1)


@dataclass(frozen=True)
class WindowGeometry:
    """The layout of one rank's arena, the same on every rank.

    Parameters: `ranks`; `windows` per source; `window_bytes`, the largest message; `copy_self`, whether a rank has
    windows for its own message too; `guard_bytes`, untouched bytes before and after each window, a multiple of 64 (for
    tests).
    """

    ranks: int
    windows: int
    window_bytes: int
    copy_self: bool = False
    guard_bytes: int = 0

    @property
    def window_stride(self) -> int:
        """Bytes from one window's header to the next one's."""
        return self.guard_bytes + HEADER_BYTES + max(LEAST_PAYLOAD, round_up(self.window_bytes, LINE_BYTES))

    @property
    def sources(self) -> int:
        """Ranks that have windows here."""
        return self.ranks if self.copy_self else self.ranks - 1

    @property
    def control_offset(self) -> int:
        return 2 * LINE_BYTES

    @property
    def windows_offset(self) -> int:
        """Of the first header; a guard lies before it."""
        return self.control_offset + self.ranks * CONTROL_BYTES + self.guard_bytes

    @property
    def staging_offset(self) -> int:
        return self.windows_offset + self.sources * self.windows * self.window_stride

    @property
    def arena_bytes(self) -> int:
        """Registered memory per rank, in bytes."""
        return self.staging_offset + self.ranks * (STAGING_BYTES + self.windows * (HEADER_BYTES + LEAST_PAYLOAD))

    def window(self, receiver: int, source: int, iteration: int) -> int:
        """Offset of the header of `source`'s message of `iteration` in `receiver`'s arena; its payload lies 64 bytes
        on."""
        if source == receiver:
            index = self.ranks - 1  # there with copy_self only
        else:
            index = source if source < receiver else source - 1
        return self.windows_offset + (index * self.windows + iteration % self.windows) * self.window_stride
