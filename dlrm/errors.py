"""Errors of the dlrm package: one class for each kind of bad input, all of them DlrmError."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class DlrmError(RuntimeError):
    """Anything that stops an inference run and that the user can do something about."""


class OptionError(DlrmError, ValueError):
    """A flag, or a combination of flags, that cannot be honoured."""


class DataError(DlrmError, ValueError):
    """A malformed or unreadable data file.

    Attributes: `file`; `line` (from 1) and `field` (its name), or None where the whole file or line is meant; `value`.
    """

    def __init__(
        self,
        file: str | Path,
        problem: str,
        *,
        line: int | None = None,
        field: str | None = None,
        value: str | None = None,
    ) -> None:
        self.file, self.line, self.field, self.value = str(file), line, field, value
        where = str(file)
        if line is not None:
            where += f", line {line}"
        if field is not None:
            where += f", field {field}"
        if value is not None:
            shown = value if len(value) <= 40 else value[:40] + "..."
            problem = f"{shown!r} {problem}"
        super().__init__(f"{where}: {problem}")


class CheckpointError(DlrmError):
    """A checkpoint that cannot be read or does not fit the model; lists every missing, extra and misshapen key."""


class CollectiveFailed(DlrmError):
    """An all-to-all of another library (--dist-backend) failed or timed out; names it, the rank and the iteration."""


class NotExact(DlrmError):
    """--verify found a bit that differs from the single-process computation."""


class BadIndex(DlrmError, ValueError):
    """A bag that cannot be looked up; raised before anything of its batch is sent.

    Attributes: `table`; `position` in its indices or offsets, `value` there, or None where the whole is meant; `size`,
    the table's rows.
    """

    def __init__(
        self, message: str, *, table: int, size: int, position: int | None = None, value: int | None = None
    ) -> None:
        self.table, self.position, self.value, self.size = table, position, value, size
        super().__init__(message)


class Disagreement(DlrmError):
    """Ranks of one run were started with different models, data or kernels; names a rank and what differs."""
