"""The reference's single-process checkpoints: a dict with `state_dict` and some numbers of the training run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dlrm.errors import CheckpointError

if TYPE_CHECKING:
    from dlrm.model import Dense
    from dlrm.shape import ModelShape
    from dlrm.tables import Tables

# Saved losses and accuracies are numpy scalars; nothing else beyond tensors and plain Python is unpickled.
_SCALARS = [
    np._core.multiarray.scalar,  # type: ignore[attr-defined]
    np.dtype,
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32")),
]


def read(path: str | Path, shape: ModelShape) -> dict[str, Tensor]:
    """The parameters of a checkpoint, memory-mapped, after a check that they are just those of `shape`.

    Raises CheckpointError where the file cannot be read without running code from it, and, naming every key, where keys
    are missing or extra, or where shapes differ.
    """
    try:
        with torch.serialization.safe_globals(_SCALARS):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_zipped(path))
    except Exception as error:  # torch.load raises anything from EOFError to pickle.UnpicklingError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: cannot be loaded as a checkpoint: {reason}") from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a checkpoint with a state_dict")
    if problems := _problems(state, shape.parameters()):
        raise CheckpointError(f"{path}: does not fit the model: {'; '.join(problems)}")
    return state


def load(state: dict[str, Tensor], tables: Tables, dense: Dense) -> None:
    """Copy the dense parameters and the rank's own tables out of a state that `read` has checked."""
    with torch.no_grad():
        for module in (tables, dense):
            for name, parameter in module.named_parameters():
                parameter.copy_(state[name])


def _zipped(path: str | Path) -> bool:
    """Whether this is torch's zip format; files of before torch 1.6 are read, but cannot be memory-mapped."""
    with Path(path).open("rb") as stream:
        return stream.read(2) == b"PK"


def _problems(state: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> list[str]:
    problems = []
    if missing := [key for key in wanted if key not in state]:
        problems.append(f"missing {', '.join(missing)}")
    if extra := [str(key) for key in state if key not in wanted]:
        problems.append(f"extra {', '.join(extra)}")
    for key, shape in wanted.items():
        if key not in state:
            continue
        if not isinstance(state[key], Tensor):
            problems.append(f"{key} is no tensor but a {type(state[key]).__name__}")
        elif tuple(state[key].shape) != shape:
            problems.append(f"{key} is {list(state[key].shape)}, wanted {list(shape)}")
        elif not state[key].dtype.is_floating_point:
            problems.append(f"{key} is {state[key].dtype}, wanted floating point")
    return problems
