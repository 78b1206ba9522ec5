"""Our own layout for large models: a folder with one safetensors file per table, so that a rank reads just its own.

    model.json           format, version, bits of a table's element, and which file has which parameter
    emb_l.00003.safetensors, ...   emb_l.3.weight, as floats or as quantised rows (see `kernels`)
    dense.safetensors    all bot_l and top_l parameters

`python -m dlrm.convert CHECKPOINT FOLDER` writes it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from dlrm import kernels, safetensors
from dlrm.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

MANIFEST = "model.json"
_FORMAT, _VERSION = "blsrdma-dlrm", 1


def read(folder: Path) -> dict[str, Tensor]:
    """Its parameters, memory-mapped. Raises CheckpointError where the manifest or a file is not understood."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        if manifest["format"] != _FORMAT or manifest["version"] != _VERSION:
            raise CheckpointError(
                f"{path}: is {manifest['format']} version {manifest['version']}, wanted {_FORMAT} {_VERSION}"
            )
        files = {str(name): str(file) for name, file in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error!r}") from error
    state: dict[str, Tensor] = {}
    for file in dict.fromkeys(files.values()):
        if "/" in file or file.startswith("."):
            raise CheckpointError(f"{path}: {file} is not a file of this folder")
        state |= safetensors.read(folder / file)
    if missing := sorted(files.keys() - state.keys()):
        raise CheckpointError(f"{path}: no file has {', '.join(missing)}")
    return state


def write(folder: Path, state: dict[str, Tensor], bits: kernels.Bits = 32) -> None:
    """Write the parameters `state` of a model into `folder`, tables as `bits` stores them; nothing may be there yet."""
    folder.mkdir(parents=True)
    kernel = kernels.choose(bits)
    files = {}
    dense = {name: tensor.float() for name, tensor in state.items() if not name.startswith("emb_l.")}
    for name, weight in state.items():
        if name in dense:
            files[name] = "dense.safetensors"
            continue
        files[name] = f"emb_l.{int(name.split('.')[1]):05d}.safetensors"
        stored = kernel.empty(len(weight), weight.shape[1])
        kernel.store(weight, stored)
        safetensors.write(folder / files[name], {name: stored})
    safetensors.write(folder / "dense.safetensors", dense)
    manifest = {"format": _FORMAT, "version": _VERSION, "bits": bits, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")  # last: it makes the folder a checkpoint
