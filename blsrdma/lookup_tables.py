"""Tables and bags as a Lookup takes them, described for the native core."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from blsrdma.errors import BagsError, SettingsError
from blsrdma.gpu.arrays import GpuArray

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    Array: TypeAlias = NDArray[Any] | torch.Tensor
    Matrix: TypeAlias = Array | GpuArray

RowFormat = Literal["fp32", "fp16", "int8", "int4"]
FORMATS: tuple[RowFormat, ...] = ("fp32", "fp16", "int8", "int4")  # numbered as in native/pool.h
MAX_DIM = 1 << 16


def row_bytes(format_: RowFormat, dim: int) -> int:
    """Bytes of a stored row of `dim` values."""
    return {"fp32": 4 * dim, "fp16": 2 * dim, "int8": dim + 8, "int4": (dim + 1) // 2 + 4}[format_]


@dataclass(frozen=True)
class Rows:
    """The rows of one table: `data`, a C-contiguous array or tensor [rows, width].

    It may lie in GPU memory: a CUDA tensor of torch, or anything with __cuda_array_interface__. See Lookup.

    float32 and float16 rows say by themselves what they are. Quantised rows are uint8, as torch stores them, and need
    `format` and `dim`: int8, `dim` elements and a float32 scale and bias (as of
    torch.ops.quantized.embedding_bag_byte_prepack); int4, two elements a byte and a float16 scale and bias (as of
    embedding_bag_4bit_prepack).
    """

    data: Matrix
    format: RowFormat | None = None
    dim: int | None = None


@dataclass(frozen=True)
class TableFacts:
    """What every rank knows of a table."""

    table: int
    owner: int
    rows: int
    dim: int
    format: RowFormat
    offset: int = 0  # of its rows in the owner's arena of tables, in get mode
    gpu: bool = False  # its rows lie in its owner's GPU memory

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, as it is stored."""
        return row_bytes(self.format, self.dim)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return self.rows * self.row_bytes


@dataclass(frozen=True, slots=True)
class Bags:
    """Bags of one table to be pooled: bag b has the rows indices[offsets[b] : offsets[b + 1]], in this order.

    `indices` int64 [n]; `offsets` int64 [bags + 1], rising, within 0 .. n (they need not begin at 0 nor end at n, so a
    slice of them asks for some of the bags); `weights` float32 [n] or None. Contiguous arrays or CPU tensors.
    """

    table: int
    indices: Array
    offsets: Array
    weights: Array | None = None


def describe(table: int, owner: int, rows: Rows | Array) -> tuple[TableFacts, Matrix]:
    """A rank's own table. Raises SettingsError for one that cannot be served."""
    given = rows if isinstance(rows, Rows) else Rows(rows)
    data = given.data
    where = f"table {table}"
    if not 0 <= table < 1 << 32:
        raise SettingsError(f"table {table!r}: tables have numbers from 0 to 2^32 - 1")
    if len(data.shape) != 2 or not _contiguous(data):
        raise SettingsError(
            f"{where}: rows must be a contiguous matrix in CPU memory, not of shape {tuple(data.shape)}"
        )
    kind = str(data.dtype).removeprefix("torch.")
    format_ = given.format or {"float32": "fp32", "float16": "fp16"}.get(kind)
    if format_ not in FORMATS:
        raise SettingsError(f"{where}: rows of {kind} need a format, one of {', '.join(FORMATS)}")
    wanted = {"fp32": "float32", "fp16": "float16"}.get(format_, "uint8")
    if kind != wanted:
        raise SettingsError(f"{where}: {format_} rows are {wanted}, not {kind}")
    dim = given.dim if given.dim is not None else int(data.shape[1]) if wanted != "uint8" else None
    if dim is None or not 0 < dim <= MAX_DIM:
        raise SettingsError(f"{where}: dim = {dim}: quantised rows need it, from 1 to {MAX_DIM}")
    width = row_bytes(format_, dim) // {"float32": 4, "float16": 2, "uint8": 1}[wanted]
    if data.shape[1] != width:
        raise SettingsError(f"{where}: {format_} rows of dim {dim} have {width} elements, not {data.shape[1]}")
    return TableFacts(table, owner, int(data.shape[0]), dim, format_, gpu=isinstance(data, GpuArray)), data


def directory(of_ranks: Sequence[Sequence[Mapping[str, Any]]]) -> list[TableFacts]:
    """All ranks' tables, in the order of their numbers. Raises SettingsError where a table has two owners."""
    found: dict[int, TableFacts] = {}
    for owner, tables in enumerate(of_ranks):
        for facts in (TableFacts(owner=owner, **each) for each in tables):
            if facts.table in found:
                raise SettingsError(f"table {facts.table} is at ranks {found[facts.table].owner} and {owner}")
            found[facts.table] = facts
    return [found[table] for table in sorted(found)]


def hot_rows(sample: Array, count: int) -> NDArray[np.int64]:
    """The (at most) `count` rows that occur most often in `sample`, row numbers as they were asked for."""
    numbers, times = np.unique(np.asarray(sample), return_counts=True)
    return np.asarray(numbers[np.argsort(-times, kind="stable")[:count]], np.int64)


def address(data: Matrix) -> int:
    """Where an array or tensor lies in memory."""
    if isinstance(data, np.ndarray):
        found: int = data.__array_interface__["data"][0]
        return found
    if isinstance(data, GpuArray):
        return data.address
    return data.data_ptr()


def describe_bags(bags: Bags) -> tuple[int, int, int, int, int]:
    """Addresses and sizes: indices, their number, offsets, bags, weights. Raises BagsError."""
    table, offsets = bags.table, bags.offsets
    _check(bags.indices, "int64", "indices", table)
    _check(offsets, "int64", "offsets", table)
    count, ends = len(bags.indices), len(offsets)
    if ends == 0:
        raise BagsError(f"table {table}: offsets are empty: one more of them than bags is needed", table)
    weights = 0
    if bags.weights is not None:
        _check(bags.weights, "float32", "weights", table)
        if len(bags.weights) != count:
            raise BagsError(f"table {table}: {len(bags.weights)} weights for {count} indices", table)
        weights = address(bags.weights)
    return address(bags.indices), count, address(offsets), ends - 1, weights


def is_tensor(data: object) -> bool:
    """Whether it is torch's. Does not import torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(data, torch.Tensor)


def _contiguous(data: Matrix) -> bool:
    if isinstance(data, GpuArray):
        return True
    if isinstance(data, np.ndarray):
        return bool(data.flags.c_contiguous)
    return data.device.type == "cpu" and data.is_contiguous()


def _check(data: Array, dtype: str, what: str, table: int) -> None:
    if not isinstance(data, np.ndarray) and not is_tensor(data):
        raise BagsError(f"table {table}: {what} must be an array or a tensor, not {type(data).__name__}", table)
    kind = str(data.dtype).removeprefix("torch.")
    if kind != dtype or len(data.shape) != 1 or not _contiguous(data):
        raise BagsError(
            f"table {table}: {what} must be {dtype}, one-dimensional, contiguous and in CPU memory, not {kind} "
            f"{list(data.shape)}",
            table,
        )
