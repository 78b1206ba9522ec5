"""What the values of flags may be."""

from __future__ import annotations

import argparse
from typing import Any

from blsrdma.settings import parse_size
from dlrm.data import MLPERF_HOTNESS


def at_least(lowest: int) -> Any:
    """A whole number that is no less than `lowest`."""

    def number(text: str) -> int:
        value = int(text)
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is less than {lowest}")
        return value

    return number


def widths(text: str) -> tuple[int, ...]:
    """A flag's list of numbers such as 512-256-1."""
    if text == "mlperf":
        return MLPERF_HOTNESS
    try:
        widths = tuple(int(word) for word in text.split("-"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 512-256-1") from None
    if min(widths) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has a number less than 1")
    return widths


def truth(text: str) -> bool:
    """True or false, in words or numbers."""
    if text.lower() not in ("1", "true", "yes", "0", "false", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("1", "true", "yes")


def positive(text: str) -> float:
    """A time, or a rate, above 0."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not a time above 0")
    return value


def size(text: str) -> int:
    """A number of bytes, also with K, M, G."""
    try:
        value = parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than a byte")
    return value
