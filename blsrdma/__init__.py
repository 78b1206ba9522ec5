"""Bounded lag synchronous collectives over UCX one-sided puts.

`Exchange` is the product: an irregular all-to-all in which a rank may run up to `lag` iterations ahead of the slowest,
and whose results are late but never stale; `Lookup` pools rows of tables that are spread over the ranks, without a
collective. Importing this package loads neither UCX nor torch; using `Exchange` does.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from blsrdma.errors import BlsrdmaError

if TYPE_CHECKING:
    from blsrdma.backend import Options
    from blsrdma.exchange import Exchange
    from blsrdma.gpu.exchange import GpuExchange
    from blsrdma.handle import Handle, Received
    from blsrdma.lookup import Lookup
    from blsrdma.lookup_tables import Bags, Rows

__all__ = [
    "Bags",
    "BlsrdmaError",
    "Exchange",
    "GpuExchange",
    "Handle",
    "Lookup",
    "Options",
    "Received",
    "Rows",
    "__version__",
]

try:
    __version__ = version("blsrdma")
except PackageNotFoundError:  # a source tree that has not been installed
    __version__ = "0+unknown"


_ROOMS = {
    "Bags": "blsrdma.lookup_tables",
    "Exchange": "blsrdma.exchange",
    "GpuExchange": "blsrdma.gpu.exchange",
    "Handle": "blsrdma.handle",
    "Lookup": "blsrdma.lookup",
    "Options": "blsrdma.backend",
    "Received": "blsrdma.handle",
    "Rows": "blsrdma.lookup_tables",
}


def __getattr__(name: str) -> object:
    if name in _ROOMS:
        return getattr(import_module(_ROOMS[name]), name)
    raise AttributeError(f"module 'blsrdma' has no attribute {name!r}")
