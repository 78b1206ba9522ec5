"""Text fields to numbers, a whole block at a time: eight characters are one 64-bit word, worked on at once.

The block comes with PADDING bytes behind it, so that a word can be read at the start of any field.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

PADDING = b"\0" * 16
_EACH = 0x0101010101010101
_TAB, _NEWLINE, _RETURN = 9, 10, 13


def separate(data: bytes) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The padded bytes of lines, and where their fields between tabs start and how long they are, in a row.

    Fourth, fields of each line. Every line has its end; CR before it is left out.
    """
    padded = np.frombuffer(data + PADDING + b"\0" * (-len(data) % 8), np.uint8)
    ends = np.flatnonzero((padded[: len(data)] - np.uint8(_TAB)) <= 1)
    last = np.flatnonzero(padded[ends] == _NEWLINE)
    starts = np.empty_like(ends)
    starts[0] = 0
    starts[1:] = ends[:-1] + 1
    lengths = ends - starts
    returns = (padded[ends[last] - 1] == _RETURN) & (lengths[last] > 0)
    lengths[last] -= returns
    return padded, starts, lengths, np.diff(last, prepend=-1)


def words(padded: NDArray[np.uint8], starts: NDArray[np.int64]) -> NDArray[np.uint64]:
    """The eight bytes from each start on, the first the lowest."""
    whole = padded.view(np.uint64)
    place = starts >> 3
    shift = ((starts & 7) << 3).astype(np.uint64)
    found: NDArray[np.uint64] = whole[place] >> shift
    found |= whole[place + 1] << (np.uint64(64) - shift)  # shifted by 64: nothing
    return found


def _aligned(padded: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Fields of up to eight characters with '0' in front, the last character the highest byte."""
    bits = (lengths << 3).astype(np.uint64)
    word = words(padded, starts) << (np.uint64(64) - bits)
    word |= np.uint64(0x30 * _EACH) >> bits
    return word


def hexadecimal(
    padded: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.uint32], bool]:
    """Numbers of up to eight hex digits, nothing counts as 0; and whether all fields were that."""
    word = _aligned(padded, starts, np.minimum(lengths, 8))
    digits = word & np.uint64(0x0F * _EACH)
    digits += ((word >> np.uint64(6)) & np.uint64(_EACH)) * np.uint64(9)
    # Written again they must be what was read; letters in lower case.
    letters = ((digits + np.uint64(6 * _EACH)) >> np.uint64(4)) & np.uint64(_EACH)
    again = digits + letters * np.uint64(0x27) + np.uint64(0x30 * _EACH)
    again ^= word | ((word >> np.uint64(1)) & np.uint64(0x20 * _EACH))
    again |= digits & np.uint64(0xF0 * _EACH)
    good = not again.any() and int(lengths.max(initial=0)) <= 8
    digits = ((digits << np.uint64(4)) | (digits >> np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
    digits = ((digits << np.uint64(8)) | (digits >> np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
    return ((digits << np.uint64(16)) | (digits >> np.uint64(32))).astype(np.uint32), good


def decimal(
    padded: NDArray[np.uint8], starts: NDArray[np.int64], lengths: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Natural numbers of up to eight digits, nothing counts as 0; and which fields were that."""
    word = _aligned(padded, starts, np.minimum(lengths, 8))
    digits = word & np.uint64(0x0F * _EACH)
    wrong: Any = (word & np.uint64(0xF0 * _EACH)) ^ np.uint64(0x30 * _EACH)
    wrong |= (digits + np.uint64(6 * _EACH)) & np.uint64(0xF0 * _EACH)
    good = (wrong == 0) & (lengths <= 8)
    digits = (digits * np.uint64(10) + (digits >> np.uint64(8))) & np.uint64(0x00FF00FF00FF00FF)
    digits = (digits * np.uint64(100) + (digits >> np.uint64(16))) & np.uint64(0x0000FFFF0000FFFF)
    digits = (digits * np.uint64(10000) + (digits >> np.uint64(32))) & np.uint64(0x00000000FFFFFFFF)
    return digits.astype(np.int64), good
