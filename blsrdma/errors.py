"""Every error that blsrdma raises on purpose. All derive from `BlsrdmaError`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class BlsrdmaError(RuntimeError):
    """Base of all errors of this package."""


class SettingsError(BlsrdmaError, ValueError):
    """A setting has a bad value, or is unknown."""


class SettingsMismatch(BlsrdmaError):
    """Ranks disagree on something that must be the same on all of them."""


class MemoryLimitExceeded(BlsrdmaError, MemoryError):
    """The windows would take more memory than the limit allows. Raised before anything is allocated."""


class RendezvousError(BlsrdmaError):
    """The ranks did not find together: some are missing at the deadline, or one reported an error."""


class RankFailed(BlsrdmaError):
    """A rank that `python -m blsrdma` or `python -m dlrm` started ended badly.

    Attributes: `rank`; `status`, its exit status, negative: the signal that ended it.
    """

    def __init__(self, message: str, rank: int, status: int) -> None:
        super().__init__(message)
        self.rank = rank
        self.status = status

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.rank, self.status)


class UcxError(BlsrdmaError):
    """A call into UCX failed."""


class GpuError(BlsrdmaError):
    """CUDA's driver refused a call, or there is none. After most of its errors the device is of no more use.

    Attributes: `result`, the driver's code; -1: there is no driver, or no such device.
    """

    def __init__(self, message: str, result: int = -1) -> None:
        super().__init__(message)
        self.result = result

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.result)


class SendBufferError(BlsrdmaError, TypeError):
    """`send` cannot be posted: not an array or tensor, not contiguous, of an unusable type, or in memory that this
    exchange does not send from."""


class CountsError(BlsrdmaError, ValueError):
    """`counts` does not describe `send`."""


class MessageTooLarge(CountsError):
    """A message is larger than a window of GPU memory; nothing has been sent.

    Attributes: `rank`, whom it is for; `bytes` of it, and `window_bytes`.
    """

    def __init__(self, message: str, rank: int, size: int, window_bytes: int) -> None:
        super().__init__(message)
        self.rank = rank
        self.bytes = size
        self.window_bytes = window_bytes

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.rank, self.bytes, self.window_bytes)


class WindowHeld(BlsrdmaError):
    """This rank posts iteration i while it still holds i - lag - 1: waiting would be waiting for itself."""


class ConcurrentUse(BlsrdmaError):
    """Another thread is in a call on this exchange: one thread at a time."""


class ExchangeClosed(BlsrdmaError):
    """The exchange has been closed by this rank."""


class PeerTimeout(BlsrdmaError, TimeoutError):
    """An iteration was not complete at the deadline. Nothing is lost: the wait may be repeated.

    Attributes: `iteration`; `missing`, the ranks whose messages are not here; and per missing rank: `counters`, how
    many of its messages are here; `states` (alive, stopped, dead, or how long it has been silent); `outstanding`, the
    bytes for it that have not left.
    """

    def __init__(
        self,
        message: str,
        iteration: int,
        counters: Mapping[int, int],
        states: Mapping[int, str] | None = None,
        outstanding: Mapping[int, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.iteration = iteration
        self.missing = tuple(counters)
        self.counters = dict(counters)
        self.states = dict(states or {})
        self.outstanding = dict(outstanding or {})

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.iteration, self.counters, self.states, self.outstanding)


class PeerFailed(BlsrdmaError):
    """A peer died or left with an error, so an iteration will never complete. The exchange is of no more use.

    Attributes: `rank`, `iteration` and `reason`.
    """

    def __init__(self, message: str, rank: int, iteration: int, reason: str) -> None:
        super().__init__(message)
        self.rank = rank
        self.iteration = iteration
        self.reason = reason

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.rank, self.iteration, self.reason)


class PeerLeft(PeerFailed):
    """A peer closed the exchange, without an error, before it posted an iteration that this rank waits for."""


class WindowCorrupt(PeerFailed):
    """What lies in a peer's window is not a message of that peer: a lying header, or a foreign write."""


class DtypeMismatch(PeerFailed):
    """A peer posted another element type in the same iteration."""


class BagsError(BlsrdmaError, ValueError):
    """Bags that cannot be looked up; raised before anything is asked for.

    Attributes: `table`; `position` in its indices or offsets, `value` there, or None where the whole is meant.
    """

    def __init__(self, message: str, table: int, position: int | None = None, value: int | None = None) -> None:
        super().__init__(message)
        self.table = table
        self.position = position
        self.value = value

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.table, self.position, self.value)


class LookupRefused(BlsrdmaError):
    """An owner refused a request that this rank had found good: a foreign write, or another list of tables there.

    Attributes: `rank`, the owner; `table` and `index` where one is to blame, else None.
    """

    def __init__(self, message: str, rank: int, table: int | None, index: int | None) -> None:
        super().__init__(message)
        self.rank = rank
        self.table = table
        self.index = index

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.rank, self.table, self.index)


class VersionError(BlsrdmaError, ValueError):
    """Tables that cannot follow those that a Lookup has: other tables, a number that does not rise, or not the one that
    other owners have loaded."""


class ReadsUnavailable(BlsrdmaError):
    """Mode get was asked for, and an owner's tables cannot be read without its help. Raised at the start."""


class CompileError(GpuError):
    """A GPU kernel cannot be compiled. Attributes: `log`, what the compiler said; empty where there is no compiler."""

    def __init__(self, message: str, log: str) -> None:
        super().__init__(message)
        self.log = log

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (str(self), self.log)
