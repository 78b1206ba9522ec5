"""From what the native core of a Lookup reports to the typed errors of blsrdma.errors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blsrdma.errors import (
    BagsError,
    BlsrdmaError,
    ConcurrentUse,
    GpuError,
    LookupRefused,
    PeerFailed,
    PeerLeft,
    PeerTimeout,
    VersionError,
    WindowCorrupt,
)
from blsrdma.ucx import native

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from blsrdma.lookup_tables import TableFacts

_Outcome = native.Outcome
_OFFSETS, _INDEX, _TABLE, _VERSION = 1, 2, 3, 5  # kinds of faults, as in native/query.h


def lookup_error(
    outcome: int, core: native.Lookup, name: str, rank: int, tables: Sequence[TableFacts], state: Callable[[int], str]
) -> BlsrdmaError:
    """The error for an outcome other than OK that `core` just returned. `state(q)`: whether rank q lives, in words."""
    kind = _Outcome(outcome)
    peer, number, theirs, text = core.details()
    where = f"lookup {name!r}, ask {number}"
    if kind == _Outcome.TIMEOUT:
        states = {q: state(q) for q in core.missing(number)}
        if text:
            return PeerTimeout(f"lookup {name!r}: rank {rank} has finished; others {text}", number, {}, {}, {})
        each = "; ".join(f"rank {q} ({how})" for q, how in states.items())
        return PeerTimeout(
            f"{where}: not complete at the deadline on rank {rank}; not answered by: {each}",
            number, dict.fromkeys(states, 0), states,
        )  # fmt: skip
    if kind == _Outcome.CONCURRENT:
        return ConcurrentUse(f"lookup {name!r}: another thread is in a call on it; one thread at a time")
    if kind in (_Outcome.BAD_BAGS, _Outcome.REFUSED):
        fault, place, position, value, limit = core.fault()
        table = tables[place].table if place < len(tables) else None
        if kind == _Outcome.BAD_BAGS:
            assert table is not None
            what = (
                f"index {value} at position {position} is not a row of a table of {limit} rows"
                if fault == _INDEX
                else f"offset {value} at position {position} does not rise, or is beyond {limit}"
            )
            return BagsError(f"table {table}: {what}", table, position, value)
        if fault == _INDEX:
            what = f"index {value} of table {table} is not a row of its {limit} rows"
        elif fault == _TABLE:
            what = f"it does not own the table asked for ({table})"
        elif fault == _VERSION:
            what, table = f"it does not have version {value} of its tables", None
        else:
            what = "what arrived is no request"
            table = None
        return LookupRefused(
            f"{where}: rank {peer} refused it: {what}", peer, table, value if fault == _INDEX else None
        )
    if kind == _Outcome.GPU_FAILED:
        result = theirs - (1 << 64) if theirs >> 63 else theirs
        return GpuError(f"{where}: this rank's GPU did not pool its own tables: {text}", result)
    if kind == _Outcome.VERSION_MISMATCH:
        return VersionError(f"lookup {name!r}: rank {peer} has loaded version {theirs}, where this rank loads {number}")
    where += f": rank {peer}"
    if kind == _Outcome.CORRUPT:
        return WindowCorrupt(f"{where}: {text}", peer, number, text)
    if kind == _Outcome.PEER_LEFT:
        return PeerLeft(f"{where} left before it answered: {text}", peer, number, text)
    if kind == _Outcome.PEER_ERRED:
        return PeerFailed(f"{where} failed: {text}", peer, number, text)
    return PeerFailed(f"{where} died: {text}", peer, number, text)


def version_error(
    error: BlsrdmaError, core: native.Lookup, name: str, version: int, state: Callable[[int], str]
) -> BlsrdmaError:
    """The same for load_tables, which waits for other ranks than an ask does."""
    if not isinstance(error, PeerTimeout):
        return error
    states = {q: state(q) for q in core.behind()}
    each = "; ".join(f"rank {q} ({how})" for q, how in states.items()) or "this rank's server, which waits for its GPU"
    return PeerTimeout(
        f"lookup {name!r}: version {version} cannot be loaded yet; not gone over to version {core.loaded}: {each}",
        version, dict.fromkeys(states, 0), states,
    )  # fmt: skip
