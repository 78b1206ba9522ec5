"""Settings of a Lookup beyond those of blsrdma.settings: keyword > environment `BLSRDMA_LOOKUP_*` > default.

| keyword         | default | meaning |
|-----------------|---------|---------|
| mode            | put     | put: owners pool rows and put them; get: requesters read rows and pool them; |
|                 |         | auto: get from owners whose tables can be read here where that costs less (measured |
|                 |         | at the start, see blsrdma.lookup_choice), put from the others |
| fetch           | bags    | what owners are asked for in put mode. bags: they pool. rows: they send them as stored, |
|                 |         | and they are pooled here; dedupe, cache_bytes and Lookup.keep() then spare some |
| dedupe          | 1       | rows that occur several times in an ask are fetched once |
| cache_bytes     | 0       | for rows of other ranks that have been fetched |
| request_bytes   | *       | of a request window; larger requests are cut. *: window_bytes |
| response_bytes  | *       | of a response window; *: window_bytes |
| pooling         | sum     | sum or mean of a bag's rows |
| updates         | 0       | in get and auto mode: room for a second version of the tables, for load_tables |
| serve           | thread  | thread: a thread without the GIL answers the others; inline: this rank's calls do |
| serve_share     | 1       | of one core, at most, for that thread: above 0, up to 1 |
| on_peer_failure | raise   | raise: PeerFailed on the asks that need it; degrade: `default_row`, counted |
| default_row     | 0       | every element of a bag that a failed owner would have answered |

lag, timeout, close_timeout, keepalive, direct, checksum and memory_limit are those of an Exchange.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

from blsrdma.errors import SettingsError
from blsrdma.settings import Settings, parse_flag, parse_size

if TYPE_CHECKING:
    from collections.abc import Mapping

CHOICES = {
    "mode": ("put", "get", "auto"),
    "fetch": ("bags", "rows"),
    "pooling": ("sum", "mean"),
    "serve": ("thread", "inline"),
    "on_peer_failure": ("raise", "degrade"),
}
_PREFIX = "BLSRDMA_LOOKUP_"


@dataclass(frozen=True)
class LookupSettings:
    """What a Lookup was asked for. The module's docstring says what each means."""

    common: Settings
    request_bytes: int
    response_bytes: int
    mode: Literal["put", "get", "auto"] = "put"
    fetch: Literal["bags", "rows"] = "bags"
    dedupe: bool = True
    updates: bool = False
    cache_bytes: int = 0
    pooling: Literal["sum", "mean"] = "sum"
    serve: Literal["thread", "inline"] = "thread"
    serve_share: float = 1.0
    on_peer_failure: Literal["raise", "degrade"] = "raise"
    default_row: float = 0.0

    @staticmethod
    def resolve(environment: Mapping[str, str] | None = None, **keywords: Any) -> LookupSettings:
        """Keywords that are not None, then the environment, then the defaults. Raises SettingsError."""
        environment = os.environ if environment is None else environment
        own = [
            *CHOICES,
            "dedupe",
            "updates",
            "cache_bytes",
            "request_bytes",
            "response_bytes",
            "serve_share",
            "default_row",
        ]
        known = {_PREFIX + name.upper(): name for name in own}
        for variable in environment:
            if variable.startswith(_PREFIX) and variable not in known:
                raise SettingsError(
                    f"unknown setting in the environment: {variable}; known: {', '.join(sorted(known))}"
                )
        values: dict[str, Any] = {}
        for variable, name in known.items():
            given = keywords.pop(name, None)
            source = name
            if given is None and variable in environment:
                given, source = environment[variable], variable
            if given is not None:
                try:
                    values[name] = _checked(name, given)
                except (ValueError, TypeError) as error:
                    raise SettingsError(f"{source} = {given!r}: {error}") from None
        rest = {name: value for name, value in environment.items() if name not in known}
        common = Settings.resolve(rest, **keywords)
        sizes = {name: values.pop(name, common.window_bytes) for name in ("request_bytes", "response_bytes")}
        return LookupSettings(common, **sizes, **values)

    def agreed(self) -> dict[str, Any]:
        """What must be the same on all ranks."""
        return {
            "lag": self.common.lag,
            "checksum": self.common.checksum,
            "request_bytes": self.request_bytes,
            "response_bytes": self.response_bytes,
            "mode": self.mode,
            "pooling": self.pooling,
            "updates": self.updates,
        }


def _checked(name: str, given: Any) -> Any:
    if name in CHOICES:
        if given not in CHOICES[name]:
            raise ValueError(f"must be one of {', '.join(CHOICES[name])}")
        return given
    if name in ("dedupe", "updates"):
        return parse_flag(str(given)) if isinstance(given, str) else bool(given)
    if name.endswith("_bytes"):
        size = parse_size(given) if isinstance(given, str) else given
        if isinstance(size, bool) or int(size) != size or size < 0:
            raise ValueError("must be an integer >= 0")
        return int(size)
    number = float(cast("float", given))
    if name == "serve_share" and not 0 < number <= 1:
        raise ValueError("must be above 0 and at most 1")
    return number
