"""Parameters from files, memory-mapped: whatever the layout, a dict from the reference's names to tensors.

What can be read (`read` tells by the file):

* the reference's checkpoint (torch.save of a dict with `state_dict` and some numbers of the training run);
* the files of a distributed run of the reference, one per rank and in rank order, `a.pt,b.pt,...` or a folder of them:
  each has the rank's tables renumbered from 0, and the MLPs that DDP wrapped have `.module.` in their names;
* safetensors, a file or a folder of files that together have all parameters;
* our own sharded layout (see `sharded`), of which a rank reads just its tables.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dlrm import kernels, safetensors, sharded
from dlrm.errors import CheckpointError
from dlrm.placement import split

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
_TABLE = re.compile(r"emb_l\.(\d+)\.weight")


def read(path: str | Path, shape: ModelShape) -> dict[str, Tensor]:
    """The parameters of a checkpoint, memory-mapped, after a check that they are just those of `shape`.

    Tables may be quantised rows (uint8) where `sharded` says so. Raises CheckpointError where a file cannot be read
    without running code from it, and, naming every key, where keys are missing or extra, or where shapes differ.
    """
    state = gather(path, shape.num_tables)
    check(state, shape, path)
    return state


def check(state: dict[str, Tensor], shape: ModelShape, path: str | Path) -> None:
    """Raise CheckpointError, naming every key that does not fit, unless a state is the parameters of `shape`."""
    if problems := _problems(state, shape):
        raise CheckpointError(f"{path}: does not fit the model: {'; '.join(problems)}")


def load(state: dict[str, Tensor], tables: Tables, dense: Dense) -> None:
    """Copy the dense parameters and the rank's own tables out of a state that `read` has checked."""
    tables.load(state)
    load_dense(state, dense)


def load_dense(state: dict[str, Tensor], dense: Dense) -> None:
    """Copy the dense parameters out of a state that `read` has checked."""
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            parameter.copy_(state[name])


def gather(path: str | Path, num_tables: int | None = None) -> dict[str, Tensor]:
    """All parameters under the names they have in one process, not yet checked; `num_tables` None: all there are.

    Raises CheckpointError.
    """
    files = [Path(name) for name in str(path).split(",")]
    if len(files) == 1 and files[0].is_dir():
        folder = files[0]
        if (folder / sharded.MANIFEST).is_file():
            return sharded.read(folder)
        names = sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
        files = [file for file in names if file.suffix == safetensors.SUFFIX]
        if files:
            return _union(files)
        files = [file for file in names if file.suffix in (".pt", ".pth", ".ckpt", ".bin")]
        files.sort(key=lambda file: [int(word) if word.isdigit() else word for word in re.split(r"(\d+)", file.name)])
        if not files:
            raise CheckpointError(f"{folder}: holds no {sharded.MANIFEST}, no *.safetensors and no *.pt")
    if len(files) > 1 and all(file.suffix == safetensors.SUFFIX for file in files):
        return _union(files)
    states = [_unwrapped(_one(file)) for file in files]
    if len(states) == 1:
        return states[0]
    found = sum(1 for state in states for key in state if _TABLE.fullmatch(key))
    return _renumbered(files, states, num_tables or found)


def _one(path: Path) -> dict[str, Tensor]:
    """The state_dict in a file."""
    if path.suffix == safetensors.SUFFIX:
        return safetensors.read(path)
    try:
        with torch.serialization.safe_globals(_SCALARS):
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=_zipped(path))
    except Exception as error:  # torch.load raises anything from EOFError to pickle.UnpicklingError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"{path}: cannot be loaded as a checkpoint: {reason}") from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, not a checkpoint with a state_dict")
    return state


def _union(files: list[Path]) -> dict[str, Tensor]:
    """The tensors of several safetensors files, each of which must have names of its own."""
    whole: dict[str, Tensor] = {}
    for file in files:
        part = _unwrapped(safetensors.read(file))
        if twice := sorted(whole.keys() & part.keys()):
            raise CheckpointError(f"{file}: has {', '.join(twice)}, which an earlier file has, too")
        whole |= part
    return whole


def _unwrapped(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the `module` that DataParallel and DistributedDataParallel put into names."""
    return {".".join(word for word in str(key).split(".") if word != "module"): value for key, value in state.items()}


def _renumbered(files: list[Path], states: list[dict[str, Tensor]], num_tables: int) -> dict[str, Tensor]:
    """The parts of a distributed run, in rank order: tables under their global numbers, dense parameters of the first.

    Raises CheckpointError where a part has not the tables of its rank, or dense parameters of other values.
    """
    whole: dict[str, Tensor] = {}
    problems = []
    for file, state, tables in zip(files, states, split(num_tables, len(files)), strict=True):
        own = sorted(int(match[1]) for key in state if (match := _TABLE.fullmatch(key)))
        if own != list(range(len(tables))):
            problems.append(f"{file.name} has tables {own}, wanted {len(tables)} of them, numbered from 0")
        for key, value in state.items():
            if match := _TABLE.fullmatch(key):
                whole[f"emb_l.{tables.start + int(match[1])}.weight"] = value
            elif key not in whole:
                whole[key] = value
            elif not torch.equal(whole[key], value):
                problems.append(f"{key} of {file.name} is not the one of {files[0].name}")
    if problems:
        raise CheckpointError(f"{files[0].parent}: not the parts of one run in rank order: {'; '.join(problems)}")
    return whole


def _zipped(path: Path) -> bool:
    """Whether this is torch's zip format; files of before torch 1.6 are read, but cannot be memory-mapped."""
    with path.open("rb") as stream:
        return stream.read(2) == b"PK"


def _problems(state: dict[str, Tensor], shape: ModelShape) -> list[str]:
    wanted = shape.parameters()
    problems = []
    if missing := [key for key in wanted if key not in state]:
        problems.append(f"missing {', '.join(missing)}")
    if extra := [str(key) for key in state if key not in wanted]:
        problems.append(f"extra {', '.join(extra)}")
    for key, size in wanted.items():
        if key not in state:
            continue
        if not isinstance(state[key], Tensor):
            problems.append(f"{key} is no tensor but a {type(state[key]).__name__}")
        elif _TABLE.fullmatch(key) and _quantised(state[key], size):
            continue
        elif tuple(state[key].shape) != size:
            problems.append(f"{key} is {list(state[key].shape)}, wanted {list(size)}")
        elif not state[key].dtype.is_floating_point:
            problems.append(f"{key} is {state[key].dtype}, wanted floating point")
    return problems


def _quantised(rows: Tensor, size: tuple[int, ...]) -> bool:
    """Whether these are the stored rows of a quantised table of `size`."""
    return rows.dtype == torch.uint8 and len(rows) == size[0] and kernels.of_rows(rows, size[1]) is not None
