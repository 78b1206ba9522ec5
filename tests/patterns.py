"""Messages whose every byte says who sent it to whom, when, and where in the message it stands."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# The ways for bytes to travel on one host: name -> environment of a rank. Direct stores unless puts are named.
TRANSPORTS = {
    "default": {},
    "default-puts": {"BLSRDMA_DIRECT": "0"},
    "posix": {"UCX_TLS": "posix,self"},
    "posix-puts": {"UCX_TLS": "posix,self", "BLSRDMA_DIRECT": "0"},
    "sysv": {"UCX_TLS": "sysv,self"},
    "sysv-puts": {"UCX_TLS": "sysv,self", "BLSRDMA_DIRECT": "0"},
    "cma": {"UCX_TLS": "posix,cma,self"},
    "cma-puts": {"UCX_TLS": "posix,cma,self", "BLSRDMA_DIRECT": "0"},
    "tcp": {"UCX_TLS": "tcp,self"},
    "tcp-puts": {"UCX_TLS": "tcp,self", "BLSRDMA_DIRECT": "0"},
}


def message(source: int, destination: int, iteration: int, size: int) -> NDArray[np.uint8]:
    """`size` bytes, a function of source, destination, iteration and offset."""
    seed = (source * 1_000_003 + destination * 10_007 + iteration * 101) & 0xFFFFFFFF
    offsets = np.arange(size, dtype=np.uint64)
    mixed = (offsets + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(56)).astype(np.uint8)


def messages(source: int, iteration: int, sizes: list[int]) -> NDArray[np.uint8]:
    """What `source` posts: the messages to all destinations, one after the other."""
    return np.concatenate([message(source, q, iteration, size) for q, size in enumerate(sizes)])
