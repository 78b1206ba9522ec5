"""How rows of a table are stored and how bags of them are pooled: one small interface, one kernel for a whole run.

Kernels round differently (another order of additions, fused multiply-adds, dequantising first or last), so every rank
of a run must use the same one, and its name belongs to whatever is compared. A bag is pooled in index order.

| name            | a row of D elements                            |
|-----------------|------------------------------------------------|
| torch-fp32      | 4 D bytes, torch.nn.functional.embedding_bag   |
| torch-fp16      | 2 D bytes, pooled in fp32, rounded to fp16     |
| torch-int8      | D + 8 bytes: uint8, fp32 scale and bias        |
| torch-int4      | ceil(D / 2) + 4 bytes: nibbles, fp16 scale, bias |
| fbgemm-int8     | D + 4 bytes: fp16 scale and bias, uint8; fbgemm-int4: D / 2 + 4 (needs fbgemm-gpu-cpu) |
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal

import torch
from torch.nn import functional

from dlrm.errors import OptionError

if TYPE_CHECKING:
    from torch import Tensor

Bits = Literal[32, 16, 8, 4]
ENCODE_ROWS = 1 << 16  # rows that are converted at a time, so that the fp32 of a large table is never held whole


class Kernel(ABC):
    """A row format and the operator that pools it."""

    name: str
    bits: Bits
    dtype: torch.dtype  # of a stored element

    @abstractmethod
    def width(self, dim: int) -> int:
        """Stored elements of a row of `dim` values."""

    @abstractmethod
    def encode(self, weight: Tensor) -> Tensor:
        """Rows of floats [n, dim] as they are stored, [n, width]."""

    @abstractmethod
    def decode(self, rows: Tensor, dim: int) -> Tensor:
        """Stored rows [n, width] as float32 [n, dim]."""

    @abstractmethod
    def pool(self, rows: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        """Sum the bags: `offsets` int64 [bags + 1] into int64 `indices`, `weights` float32 as many; [bags, dim].

        Indices must be in range (see `bags`).
        """

    def row_bytes(self, dim: int) -> int:
        """Bytes of a stored row."""
        return self.width(dim) * self.dtype.itemsize

    def empty(self, rows: int, dim: int) -> Tensor:
        """Memory for `rows` stored rows."""
        return torch.empty(rows, self.width(dim), dtype=self.dtype)

    def store(self, weight: Tensor, out: Tensor) -> None:
        """Encode `weight` [n, dim], of any floating dtype, into `out` [n, width], a part at a time."""
        for start in range(0, weight.shape[0], ENCODE_ROWS):
            out[start : start + ENCODE_ROWS] = self.encode(weight[start : start + ENCODE_ROWS])


class TorchFloat(Kernel):
    """Rows of floats, pooled by torch.nn.functional.embedding_bag."""

    def __init__(self, bits: Bits, dtype: torch.dtype) -> None:
        self.name, self.bits, self.dtype = f"torch-fp{bits}", bits, dtype

    def width(self, dim: int) -> int:
        """See `Kernel.width`."""
        return dim

    def encode(self, weight: Tensor) -> Tensor:
        """See `Kernel.encode`."""
        return weight.to(self.dtype)

    def decode(self, rows: Tensor, dim: int) -> Tensor:
        """See `Kernel.decode`."""
        return rows[:, :dim].float()

    def pool(self, rows: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        """See `Kernel.pool`."""
        return functional.embedding_bag(
            indices,
            rows,
            offsets,
            mode="sum",
            include_last_offset=True,
            per_sample_weights=None if weights is None else weights.to(self.dtype),
        )


class TorchQuantised(Kernel):
    """Row-wise quantised rows, pooled by torch.ops.quantized.embedding_bag_byte or _4bit."""

    dtype = torch.uint8

    def __init__(self, bits: Literal[8, 4]) -> None:
        self.name, self.bits = f"torch-int{bits}", bits
        word = "byte" if bits == 8 else "4bit"
        self._prepack = getattr(torch.ops.quantized, f"embedding_bag_{word}_prepack")
        self._unpack = getattr(torch.ops.quantized, f"embedding_bag_{word}_unpack")
        self._bag = getattr(torch.ops.quantized, f"embedding_bag_{word}_rowwise_offsets")

    def width(self, dim: int) -> int:
        """See `Kernel.width`."""
        return dim + 8 if self.bits == 8 else (dim + 1) // 2 + 4

    def encode(self, weight: Tensor) -> Tensor:
        """See `Kernel.encode`."""
        rows: Tensor = self._prepack(weight.float().contiguous())
        return rows

    def decode(self, rows: Tensor, dim: int) -> Tensor:
        """See `Kernel.decode`."""
        weight: Tensor = self._unpack(rows.contiguous())
        return weight[:, :dim]

    def pool(self, rows: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        """See `Kernel.pool`."""
        pooled: Tensor = self._bag(rows, indices, offsets, False, 0, False, weights, None, True)
        return pooled


def choose(bits: int, family: str = "torch", dim: int | None = None) -> Kernel:
    """The kernel for rows of `bits` per element, of the family `torch` or `fbgemm`. Raises OptionError.

    With `dim`, widths the row format cannot hold are refused, too.
    """
    if bits == 4 and dim is not None and dim % 2:
        raise OptionError(f"--quantize-emb-with-bit 4 wants an even --arch-sparse-feature-size, not {dim}")
    if family == "fbgemm":
        from dlrm.fbgemm import FbgemmQuantised

        if bits not in (8, 4):
            raise OptionError(f"--table-kernel fbgemm is for 8 or 4 bits, not {bits}: use --table-kernel torch")
        return FbgemmQuantised(8 if bits == 8 else 4)
    match bits:
        case 32:
            return TorchFloat(32, torch.float32)
        case 16:
            return TorchFloat(16, torch.float16)
        case 8 | 4:
            return TorchQuantised(8 if bits == 8 else 4)
        case _:
            raise OptionError(f"--quantize-emb-with-bit {bits}: tables have 32, 16, 8 or 4 bits")


def of_rows(rows: Tensor, dim: int) -> Kernel | None:
    """The torch kernel whose format stored rows [n, width] have; None where it is none of them."""
    if rows.dtype.is_floating_point:
        return TorchFloat(32, torch.float32) if rows.dim() == 2 and rows.shape[1] == dim else None
    for bits in (8, 4):
        kernel = choose(bits)
        if rows.dtype == kernel.dtype and rows.dim() == 2 and rows.shape[1] == kernel.width(dim):
            return kernel
    return None
