"""Messages whose every byte depends on who sent it to whom, when, and where in the message it stands.

A message is a slice of one pool of random bytes. Where it begins depends on source, destination and iteration: as cheap
as a copy, and the bytes of another message, iteration or offset are very unlikely to be the right ones.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

_STARTS = 1 << 20
_MASK = (1 << 64) - 1


class WrongBytes(Exception):
    """A message is not what its source sent."""


class Pool:
    """Messages of up to `largest` bytes."""

    def __init__(self, largest: int, seed: int = 1) -> None:
        self._bytes = np.frombuffer(np.random.RandomState(seed).bytes(largest + _STARTS), np.uint8)

    def message(self, source: int, destination: int, iteration: int, size: int) -> Bytes:
        """A view: do not write to it."""
        start = _mixed(source, destination, iteration) % _STARTS
        return self._bytes[start : start + size]

    def fill(self, out: Bytes, source: int, iteration: int, sizes: list[int]) -> None:
        """Write what `source` sends: its messages to all destinations, one after the other."""
        start = 0
        for destination, size in enumerate(sizes):
            out[start : start + size] = self.message(source, destination, iteration, size)
            start += size

    def check(self, message: Bytes, source: int, destination: int, iteration: int, size: int) -> None:
        """Raise WrongBytes unless `message` is the one of `size` bytes that was sent."""
        wanted = self.message(source, destination, iteration, size)
        if len(message) == size and (message == wanted).all():
            return
        where = f"iteration {iteration}, from rank {source} to rank {destination}"
        if len(message) != size:
            raise WrongBytes(f"{where}: {len(message)} bytes, not {size}")
        wrong = np.flatnonzero(message != wanted)
        first = int(wrong[0])
        what = f"the first at {first}: {message[first]}, not {wanted[first]}"
        raise WrongBytes(f"{where}: {len(wrong)} of {size} bytes are wrong, {what}")


def _mixed(source: int, destination: int, iteration: int) -> int:
    # The finish of splitmix64, of a number that is different for each message.
    z = ((iteration << 24 | source << 12 | destination) * 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)
