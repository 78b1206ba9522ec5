"""FBGEMM's quantised bags, an optional extra: `pip install --no-deps fbgemm-gpu-cpu`, of a version that fits torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

import torch

from dlrm.errors import OptionError
from dlrm.kernels import Kernel

if TYPE_CHECKING:
    from torch import Tensor

# Numbers that FBGEMM's operators take: types of elements, sum pooling, rows in host memory.
_FP32, _INT8, _INT4 = 0, 2, 3
_SUM, _HOST = 0, 3
_HEAD = 4  # bytes of fp16 scale and bias before the elements


class FbgemmQuantised(Kernel):
    """Row-wise quantised rows, pooled by FBGEMM's inference operator.

    Raises OptionError where fbgemm_gpu is not installed, or does not fit this torch.
    """

    dtype = torch.uint8

    def __init__(self, bits: Literal[8, 4]) -> None:
        self.name, self.bits = f"fbgemm-int{bits}", bits
        try:
            import_module("fbgemm_gpu")  # registers the operators
            self._bag: Any = torch.ops.fbgemm.int_nbit_split_embedding_codegen_lookup_function
            self._quantise: Any = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf
            self._restore: Any = torch.ops.fbgemm.FusedNBitRowwiseQuantizedSBHalfToFloat
        except (ImportError, OSError, AttributeError) as error:
            reason = f"fbgemm_gpu cannot be used ({error}); pip install fbgemm-gpu-cpu, or leave it out"
            raise OptionError(f"--table-kernel fbgemm: {reason}") from error

    def width(self, dim: int) -> int:
        """See `Kernel.width`."""
        return _HEAD + (dim if self.bits == 8 else (dim + 1) // 2)

    def encode(self, weight: Tensor) -> Tensor:
        """See `Kernel.encode`."""
        rows = self._quantise(weight.float().contiguous(), self.bits)
        return torch.cat([rows[:, -_HEAD:], rows[:, :-_HEAD]], dim=1)

    def decode(self, rows: Tensor, dim: int) -> Tensor:
        """See `Kernel.decode`."""
        weight: Tensor = self._restore(torch.cat([rows[:, _HEAD:], rows[:, :_HEAD]], dim=1).contiguous(), self.bits)
        return weight[:, :dim]

    def pool(self, rows: Tensor, indices: Tensor, offsets: Tensor, weights: Tensor | None) -> Tensor:
        """See `Kernel.pool`."""
        dim = (rows.shape[1] - _HEAD) * (8 // self.bits)
        small, large = (0, dim) if self.bits == 8 else (dim, 0)
        pooled: Tensor = self._bag(
            rows.view(-1), torch.empty(0, dtype=torch.uint8), torch.tensor([_HOST], dtype=torch.int32),
            torch.zeros(1, dtype=torch.int64), torch.tensor([_INT8 if large else _INT4], dtype=torch.uint8),
            torch.tensor([0, dim], dtype=torch.int32), dim, 0, small, large, 0, 0,
            indices, offsets, _SUM, weights, output_dtype=_FP32, row_alignment=1,
        )  # fmt: skip
        return pooled
