"""How the ranks of a Lookup find together: what each says of itself, what cannot be, and the native core for it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blsrdma import hosts, request_windows
from blsrdma.errors import BlsrdmaError, MemoryLimitExceeded, ReadsUnavailable, SettingsError
from blsrdma.gpu.tables import staging_bytes
from blsrdma.lookup_tables import FORMATS, directory
from blsrdma.peers import Neighbours
from blsrdma.settings import default_memory_limit, format_size, timeout_ns
from blsrdma.ucx import native

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from blsrdma.fabric import Fabric
    from blsrdma.lookup_settings import LookupSettings
    from blsrdma.lookup_store import OwnTables
    from blsrdma.lookup_tables import TableFacts
    from blsrdma.rendezvous import Rendezvous, Round
    from blsrdma.windows import WindowGeometry

_ERRED = 2  # as in native/layout.h

Geometries = tuple["WindowGeometry", "WindowGeometry"]


def refuse_what_cannot_be(
    settings: LookupSettings, geometry: Geometries, own: OwnTables, places: int, ranks: int
) -> None:
    """Raise SettingsError or MemoryLimitExceeded. `places`: for versions of the tables in registered memory."""
    if settings.request_bytes < request_windows.LEAST_REQUEST_BYTES:
        raise SettingsError(
            f"request_bytes = {settings.request_bytes}: must be at least {request_windows.LEAST_REQUEST_BYTES}"
        )
    if own.gpu is not None and settings.mode != "put":
        raise SettingsError(
            f"mode = {settings.mode}: table {own.gpu.numbers[0]} is in GPU memory, which is served in mode put only; "
            "blsrdma.gpu.lookup.GpuLookup reads tables out of the GPU memory of a host's ranks"
        )
    if own.gpu is not None and settings.serve == "inline":
        raise SettingsError(
            f"serve = inline: table {own.gpu.numbers[0]} is in GPU memory, and calls of this rank would wait for its "
            "GPU on behalf of others: use serve thread"
        )
    widest = max((facts.dim for facts in own.facts), default=0)
    if settings.response_bytes < 4 * widest:
        raise SettingsError(f"response_bytes = {settings.response_bytes}: must hold one pooled row, {4 * widest} bytes")
    limit = settings.common.memory_limit
    if limit is None:
        limit = default_memory_limit(int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))
    windows = [each.arena_bytes for each in geometry]
    rows = own.arena_bytes(places) if places else 0
    staged = staging_bytes(settings.request_bytes, settings.response_bytes, widest) if own.gpu is not None else 0
    if (needed := sum(windows) + rows + staged) > limit:
        versions = " in two versions" if places > 1 else ""
        locked = f", {format_size(staged)} page-locked for a GPU" if staged else ""
        raise MemoryLimitExceeded(
            f"lookups need {format_size(needed)} per rank ({format_size(windows[0])} of request "
            f"windows, {format_size(windows[1])} of response windows, {format_size(rows)} of registered tables"
            f"{versions}{locked}); memory_limit is {format_size(limit)}"
        )


@dataclass(frozen=True)
class Opened:
    """What a lookup works with once all ranks have found together."""

    core: native.Lookup
    tables: list[TableFacts]  # all ranks', in the order of their numbers
    neighbours: Neighbours


def connect(
    rendezvous: Rendezvous, met: Round, fabric: Fabric, arenas: Sequence[native.Arena], own: OwnTables,
    geometry: Geometries, rank: int, name: str, settings: LookupSettings, version: int, quarantine: list[Any],
) -> Opened:  # fmt: skip
    """Connect to all peers, and wait until they have. What a peer may still write into goes to `quarantine` where that
    fails. Raises what cannot be, on every rank."""
    blobs = [deep(blob) for blob in met.blobs]
    error: BaseException | None = None
    core, opened = None, None
    try:
        tables = directory([blob["tables"] for blob in blobs])
        widest = max((facts.dim for facts in tables), default=0)
        if settings.response_bytes < 4 * widest:
            raise SettingsError(f"response_bytes = {settings.response_bytes}: must be at least {4 * widest}")
        neighbours = Neighbours(blobs, rank)
        core = _make_core(fabric, arenas, tables, own, geometry, rank, settings, version, met.epoch, neighbours.here)
        peers = [
            (q, blob["address"], [(each["rkey"], each["base"], each["token"]) for each in blob["arenas"]],
             neighbours.pid(q))
            for q, blob in enumerate(blobs) if q != rank
        ]  # fmt: skip
        core.connect(peers, neighbours.pidfds(), timeout_ns(settings.common.timeout))
        opened = Opened(core, tables, neighbours)
        if settings.mode == "get":
            _refuse_what_cannot_be_read(opened, rank, name)
    except BaseException as failed:
        error = failed
    try:
        rendezvous.confirm(error)
    except BlsrdmaError:
        if core is not None and not core.close(_ERRED, 0, "it could not connect", timeout_ns(1.0)):
            quarantine.append((core, arenas, fabric, own))
        if isinstance(error, SettingsError | ReadsUnavailable):
            raise error from None
        raise
    assert opened is not None
    return opened


def _refuse_what_cannot_be_read(opened: Opened, rank: int, name: str) -> None:
    owners = {facts.owner for facts in opened.tables} - {rank}
    if apart := [q for q in sorted(owners) if not opened.core.readable(q)]:
        raise ReadsUnavailable(
            f"lookup {name!r}, mode get: rank {rank} can neither map nor read the tables of rank "
            f"{', '.join(map(str, apart))}, nor get them over {opened.core.transport(apart[0])}: UCX would emulate "
            "that, and need the owner (it gets over rc, dc, cma and xpmem): use mode put, or auto"
        )


def _make_core(
    fabric: Fabric, arenas: Sequence[native.Arena], tables: Sequence[TableFacts], own: OwnTables, geometry: Geometries,
    rank: int, settings: LookupSettings, version: int, epoch: int, here: int,
) -> native.Lookup:  # fmt: skip
    """The native core, not connected. `arenas`: of requests, of responses and, maybe, of tables; `here`: ranks on this
    host."""
    common = settings.common
    described = [
        (facts.owner, facts.dim, FORMATS.index(facts.format), facts.rows, facts.offset, own.address(0, facts.table))
        for facts in tables
    ]
    # Whoever spins takes a core from somebody who works, unless there are enough for a loop and a server of each.
    free = 2 * here <= hosts.cores()
    core = native.Lookup(
        fabric.native, arenas[0], arenas[1], arenas[2] if len(arenas) > 2 else None, described,
        (_native(geometry[0]), _native(geometry[1])), rank, common.lag, epoch, (version, settings.updates),
        common.direct, common.checksum, settings.mode != "put",
        (settings.fetch == "rows", settings.dedupe, settings.cache_bytes), settings.serve == "inline",
        settings.on_peer_failure == "degrade", settings.default_row, settings.serve_share,
        timeout_ns(common.keepalive), (2000 if free else 0, 1000 if free else 20), (2000 if free else 0, 2),
    )  # fmt: skip
    if own.gpu is not None:
        there = [number for number, facts in enumerate(tables) if facts.owner == rank and facts.gpu]
        serving, asking = own.gpu.poolers
        core.use(serving, asking, there)
    return core


def _native(geometry: WindowGeometry) -> native.Geometry:
    made = native.Geometry()
    for field in ("ranks", "windows", "window_bytes", "window_stride", "control_offset", "windows_offset",
                  "staging_offset", "arena_bytes"):  # fmt: skip
        setattr(made, field, getattr(geometry, field))
    return made


def flat(blob: dict[str, Any]) -> dict[str, Any]:
    """What a rank says of itself, for a rendezvous, which carries bytes at the top level only."""
    top = {key: value for key, value in blob.items() if key != "arenas"}
    top["arenas"] = len(blob["arenas"])
    return top | {f"{key}/{n}": value for n, each in enumerate(blob["arenas"]) for key, value in each.items()}


def deep(top: Mapping[str, Any]) -> dict[str, Any]:
    """The same again."""
    arenas = [{key: top[f"{key}/{n}"] for key in ("rkey", "base", "token")} for n in range(top["arenas"])]
    return {**top, "arenas": arenas}
