"""Settings, in one place: keyword > environment `BLSRDMA_*` > default. Unknown settings are refused.

| keyword       | environment           | default | meaning |
|---------------|-----------------------|---------|---------|
| lag           | BLSRDMA_LAG           | 0       | iterations a rank may run ahead of the slowest; 0: synchronous |
| window_bytes  | BLSRDMA_WINDOW_BYTES  | 1M      | messages up to this size go into windows; larger ones are pulled |
| timeout       | BLSRDMA_TIMEOUT       | 60      | seconds before a wait ends in PeerTimeout; inf: never |
| close_timeout | BLSRDMA_CLOSE_TIMEOUT | 5       | seconds close() waits for the peers to have closed too |
| keepalive     | BLSRDMA_KEEPALIVE     | 20      | seconds without a sign of life before a peer elsewhere is dead |
| direct        | BLSRDMA_DIRECT        | 1       | go through the memory of peers on this host; 0: through UCX |
| copy_self     | BLSRDMA_COPY_SELF     | 0       | copy the message to oneself; 0: it is a view of `send` |
| trace         | BLSRDMA_TRACE         | off     | folder for this rank's timeline, see blsrdma.trace |
| checksum      | BLSRDMA_CHECKSUM      | 0       | verify the contents of every message |
| gpu_path      | BLSRDMA_GPU_PATH      | auto    | of GpuExchange: ipc writes into the peers' GPU memory, staged |
|               |                       |         | goes through host memory, auto chooses for each peer |
| memory_limit  | BLSRDMA_MEMORY_LIMIT  | *       | bytes per rank, of windows and of large messages received without |
|               |                       |         | `out`; *: half of the machine's memory / ranks on it |

Sizes may end in K, M, G (powers of 1024) with or without iB. Numbers of seconds may be `inf`.
UCX's own settings are set by blsrdma.fabric; a variable UCX_* of the user's takes precedence over them.
"""

from __future__ import annotations

import difflib
import math
import os
import re
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from blsrdma.errors import SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# Variables with our prefix that are not settings of the exchange: read by dlrm, by the tests and by ci/setup.
OTHER_VARIABLES = frozenset(
    {"BLSRDMA_DEBUG", "BLSRDMA_TEST_DATA", "BLSRDMA_TEST_SECONDS", "BLSRDMA_EXTRAS", "BLSRDMA_SOFTROCE"}
)


def parse_size(text: str) -> int:
    """'65536', '64K', '1.5 MiB' as bytes. Raises ValueError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text, re.IGNORECASE)
    if not found:
        raise ValueError("not a size such as 65536, 64K or 1GiB")
    return int(float(found[1]) * 1024 ** " kmgt".index(found[2].lower() or " "))


def parse_flag(text: str) -> bool:
    """'1', 'yes', 'on', 'true' or their opposites. Raises ValueError."""
    word = text.strip().lower()
    if word in ("1", "y", "yes", "on", "true"):
        return True
    if word in ("0", "n", "no", "off", "false"):
        return False
    raise ValueError("not a flag: 1 or 0")


def format_size(count: int) -> str:
    """3145728 as '3.0 MiB'."""
    if count < 1024:
        return f"{count} B"
    size = float(count)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} TiB"


def _at_least(low: int) -> Callable[[Any], Any]:
    def checked(value: Any) -> int:
        if isinstance(value, bool) or int(value) != value or value < low:
            raise ValueError(f"must be an integer >= {low}")
        return int(value)

    return checked


def _seconds(value: Any) -> float:
    seconds = float(value)
    if not seconds >= 0:  # also refuses NaN
        raise ValueError("must be a number of seconds >= 0, or inf")
    return seconds


def _flag(value: Any) -> bool:
    if not isinstance(value, bool) and value not in (0, 1):
        raise ValueError("must be True or False")
    return bool(value)


def _folder(value: Any) -> str | None:
    return str(os.fspath(value)) or None


def _gpu_path(value: Any) -> str:
    if value not in GPU_PATHS:
        raise ValueError(f"must be one of {', '.join(GPU_PATHS)}")
    return str(value)


GPU_PATHS = ("auto", "ipc", "staged")
MAX_LAG = 1 << 16  # beyond any use; keeps products of sizes far from 64 bits

# name -> (from text, check of a value)
_KINDS: dict[str, tuple[Callable[[str], Any], Callable[[Any], Any]]] = {
    "lag": (int, _at_least(0)),
    "window_bytes": (parse_size, _at_least(0)),
    "timeout": (float, _seconds),
    "close_timeout": (float, _seconds),
    "keepalive": (float, _seconds),
    "direct": (parse_flag, _flag),
    "copy_self": (parse_flag, _flag),
    "checksum": (parse_flag, _flag),
    "trace": (str, _folder),
    "gpu_path": (str, _gpu_path),
    "memory_limit": (parse_size, _at_least(0)),
}


@dataclass(frozen=True)
class Settings:
    """What an Exchange was asked for. The module's docstring says what each means."""

    lag: int = 0
    window_bytes: int = 1 << 20
    timeout: float = 60.0
    close_timeout: float = 5.0
    keepalive: float = 20.0
    direct: bool = True
    copy_self: bool = False
    checksum: bool = False
    trace: str | None = None
    gpu_path: str = "auto"
    memory_limit: int | None = None

    @staticmethod
    def resolve(environment: Mapping[str, str] | None = None, **keywords: Any) -> Settings:
        """Keywords that are not None, then the environment, then the defaults. Raises SettingsError."""
        environment = os.environ if environment is None else environment
        known = {"BLSRDMA_" + field.name.upper(): field.name for field in fields(Settings)}
        for variable in environment:
            if variable.startswith("BLSRDMA_LOOKUP_"):
                continue  # blsrdma.lookup_settings knows them
            if variable.startswith("BLSRDMA_") and variable not in known and variable not in OTHER_VARIABLES:
                near = difflib.get_close_matches(variable, known, 1)
                hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(known))}"
                raise SettingsError(f"unknown setting in the environment: {variable}{hint}")
        values: dict[str, Any] = {}
        for variable, name in known.items():
            from_text, check = _KINDS[name]
            given = keywords.pop(name, None)
            source = name if given is not None else variable
            try:
                if given is not None:
                    values[name] = check(given)
                elif variable in environment:
                    given = environment[variable]
                    values[name] = check(from_text(given))
            except (ValueError, TypeError) as error:
                raise SettingsError(f"{source} = {given!r}: {error}") from None
        if keywords:
            raise SettingsError(f"unknown setting: {', '.join(sorted(keywords))}")
        if values.get("lag", 0) > MAX_LAG:
            raise SettingsError(f"lag = {values['lag']}: must be at most {MAX_LAG}")
        return Settings(**values)


def default_memory_limit(ranks_here: int) -> int:
    """Half of this machine's memory, shared evenly by the ranks on it, in bytes."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total // 2 // max(1, ranks_here)


def timeout_ns(seconds: float) -> int:
    """A deadline as the native core takes it: nanoseconds; negative means never."""
    return -1 if math.isinf(seconds) else round(seconds * 1e9)
