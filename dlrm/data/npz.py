"""Arrays of a .npz file, read in order a few rows at a time: mapped where stored, streamed where compressed."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from dlrm.errors import DataError

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Member:
    """An array [N, ...] of which `take` gives the next rows. Its dtype is a number's: nothing is unpickled."""

    def __init__(self, archive: zipfile.ZipFile, name: str) -> None:
        self._archive, self._name = archive, name
        info = archive.getinfo(name)
        self.file = Path(str(archive.filename))
        with archive.open(name) as stream:
            self.shape, self._columns, self.dtype = _header(stream, self.file, name)
            self._data = stream.tell()
        self._at = 0
        self._mapped: NDArray[Any] | None = None
        self._streams: list[IO[bytes]] = []
        if 0 in self.shape:
            self._mapped = np.empty(self.shape, self.dtype)
        elif info.compress_type == zipfile.ZIP_STORED:
            start = info.header_offset + _local_header(self.file, info.header_offset) + self._data
            order: Any = "F" if self._columns else "C"
            self._mapped = np.memmap(self.file, self.dtype, "r", start, self.shape, order)

    def take(self, rows: int) -> NDArray[Any]:
        """The next rows, fewer at the end."""
        lo = self._at
        hi = self._at = min(lo + rows, self.shape[0])
        if self._mapped is not None:
            return np.asarray(self._mapped[lo:hi])
        width = int(np.prod(self.shape[1:]))
        streams = width if self._columns and width > 1 else 1
        if not self._streams:
            for column in range(streams):  # a stream per column, each at its start
                stream = self._archive.open(self._name)
                self._streams.append(stream)
                stream.seek(self._data + column * self.shape[0] * self.dtype.itemsize)
        count = (hi - lo) * (width // streams) * self.dtype.itemsize
        parts = [np.frombuffer(self._exactly(stream, count), self.dtype) for stream in self._streams]
        if streams > 1:
            return np.stack(parts, axis=1)
        return parts[0].reshape(hi - lo, *self.shape[1:])

    def _exactly(self, stream: IO[bytes], count: int) -> bytes:
        try:
            data = stream.read(count)
        except (OSError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(self.file, f"{self._name} cannot be read on: {error}") from error
        if len(data) != count:
            raise DataError(self.file, f"{self._name} ends early")
        return data


def members(path: str | Path) -> dict[str, Member]:
    """The arrays of a file by name. Raises DataError."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(path, f"cannot be opened as .npz: {error}") from error
    return {name.removesuffix(".npy"): Member(archive, name) for name in archive.namelist()}


def need(found: dict[str, Member], path: str | Path, *names: str) -> list[Member]:
    """Some arrays of a file. Raises DataError naming those that are missing, and where lengths differ."""
    if missing := [name for name in names if name not in found]:
        raise DataError(path, f"has no array {', '.join(missing)}, but {', '.join(found)}")
    chosen = [found[name] for name in names]
    if len({member.shape[0] for member in chosen}) > 1:
        raise DataError(path, f"arrays {', '.join(names)} have {[member.shape[0] for member in chosen]} rows")
    return chosen


def _header(stream: IO[bytes], file: Path, name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, columns, dtype = reader(stream)
    except (ValueError, EOFError) as error:
        raise DataError(file, f"{name} is no array: {error}") from error
    if dtype.kind not in "iufb" or not shape:
        raise DataError(file, f"{name} is {dtype} {shape}, wanted rows of numbers")
    return shape, bool(columns), dtype


def _local_header(file: Path, offset: int) -> int:
    """Bytes of a zip member's own header, which may be longer than the one in the directory."""
    with file.open("rb") as stream:
        stream.seek(offset + 26)
        name, extra = int.from_bytes(stream.read(2), "little"), int.from_bytes(stream.read(2), "little")
    return 30 + name + extra
