"""Text files, plain or gzip, as blocks of whole lines: memory does not grow with the file."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

from dlrm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK_BYTES = 1 << 17  # what is parsed at a time stays in the cache
_GZIP_MAGIC = b"\x1f\x8b"


def open_text(path: str | Path) -> BinaryIO:
    """The uncompressed bytes of a file. Raises DataError."""
    path = Path(path)
    try:
        with path.open("rb") as probe:
            compressed = probe.read(2) == _GZIP_MAGIC
        return cast("BinaryIO", gzip.open(path, "rb")) if compressed else path.open("rb")
    except OSError as error:
        raise DataError(path, f"cannot be opened: {error.strerror or error}") from error


def whole_lines(path: str | Path, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, bytes]]:
    """(number of the first line, from 1; lines with their ends) of about `block_bytes`; the last line gets an end.

    Raises DataError where the file cannot be read on, after the lines before that.
    """
    line, held, size = 1, [], 0
    with open_text(path) as stream:
        while True:
            problem: Exception | None = None
            try:
                piece = stream.read1(block_bytes)  # type: ignore[attr-defined]
            except (OSError, EOFError, zlib.error) as error:
                piece, problem = b"", error
            held.append(piece)
            size += len(piece)
            if piece and size < block_bytes:
                continue
            data = b"".join(held)
            if piece or problem is not None:
                cut = data.rfind(b"\n") + 1
            else:
                data += b"" if not data or data.endswith(b"\n") else b"\n"
                cut = len(data)
            if cut:
                yield line, data[:cut]
                line += data.count(b"\n", 0, cut)
            if problem is not None:
                raise DataError(path, f"cannot be read on: {problem}", line=line) from problem
            if not piece:
                return
            held, size = [data[cut:]], len(data) - cut
