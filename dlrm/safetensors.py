"""The safetensors format, read by memory mapping and written: 8 bytes of header length, a JSON header, the data.

Nothing in such a file can run; whatever the header says is checked against the file before any of it is used.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dlrm.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

SUFFIX = ".safetensors"
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_HEADER_LIMIT = 100 << 20  # as in the reference implementation


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file, memory-mapped: their bytes are read when they are used. Raises CheckpointError."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, _HEADER_LIMIT):
                raise CheckpointError(f"{path}: is no safetensors file: {size} bytes, its header would have {length}")
            header = json.loads(stream.read(length))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: is no safetensors file: its header is a {type(header).__name__}")
    data = size - 8 - length
    # Copy on write, since torch has no read-only tensors.
    mapped = torch.from_numpy(np.memmap(path, np.uint8, "c", 8 + length)) if data else torch.empty(0, dtype=torch.uint8)
    return {name: _tensor(path, mapped, data, name, entry) for name, entry in header.items() if name != "__metadata__"}


def write(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write contiguous tensors one after another; the file appears whole or not at all."""
    path = Path(path)
    header: dict[str, Any] = {}
    at = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64 + 56)  # data at a multiple of 64 bytes
    partial = path.with_name(path.name + ".part")
    with partial.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for tensor in tensors.values():
            if tensor.numel():
                tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tofile(stream)
    partial.rename(path)


def _tensor(path: Path, mapped: Tensor, size: int, name: str, entry: Any) -> Tensor:
    try:
        dtype, shape = _TYPES[entry["dtype"]], [int(length) for length in entry["shape"]]
        start, end = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the entry of {name} is not understood: {entry!r:.200}") from error
    needed = int(np.prod(shape, dtype=object)) * dtype.itemsize if shape else dtype.itemsize
    if min(shape, default=0) < 0 or not 0 <= start <= end <= size or end - start != needed:
        raise CheckpointError(f"{path}: {name}: bytes {start} to {end} of {size} are not a {dtype} of {shape}")
    piece = mapped[start:end]
    if piece.data_ptr() % dtype.itemsize:
        piece = piece.clone()
    return piece.view(dtype).view(shape)
