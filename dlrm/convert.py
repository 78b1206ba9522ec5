"""`python -m dlrm.convert CHECKPOINT FOLDER`: a checkpoint of any layout as our own, which ranks read in parts."""

from __future__ import annotations

import argparse
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from dlrm import checkpoint, sharded
from dlrm.__main__ import guarded
from dlrm.errors import CheckpointError, OptionError
from dlrm.shape import ModelShape

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from dlrm.kernels import Bits

_EPILOG = """\
examples:
  python -m dlrm.convert model.pt model/                      then: python -m dlrm --load-model model/ ...
  python -m dlrm.convert rank0.pt,rank1.pt model/ --quantize-emb-with-bit 8      rows of dim + 8 bytes
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 1 after an error."""
    parser = argparse.ArgumentParser(
        prog="python -m dlrm.convert",
        description=__doc__,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", help="a file, files in rank order a.pt,b.pt, or a folder; see dlrm --load-model")
    parser.add_argument("folder", type=Path, help="where to write; must not exist yet")
    parser.add_argument(
        "--quantize-emb-with-bit", type=int, choices=(32, 16, 8, 4), default=32, help="how tables are stored (32)"
    )
    given = parser.parse_args(sys.argv[1:] if argv is None else argv)

    def run() -> None:
        shape = convert(given.checkpoint, given.folder, given.quantize_emb_with_bit)
        print(f"{given.folder}: {shape.num_tables} tables, {sum(shape.table_rows):,} rows of {shape.dim}")

    return guarded("convert", run, debug=False)


def convert(path: str, folder: Path, bits: Bits = 32) -> ModelShape:
    """Write the checkpoint `path` into `folder`; the shape it has. Raises CheckpointError, OptionError."""
    if folder.exists():
        raise OptionError(f"{folder} is there already")
    state = checkpoint.gather(path)
    shape = shape_of(state, path)
    checkpoint.check(state, shape, path)
    if any(not tensor.dtype.is_floating_point for tensor in state.values()):
        raise CheckpointError(f"{path}: its tables are quantised already")
    sharded.write(folder, state, bits)
    return shape


def shape_of(state: dict[str, Tensor], path: str) -> ModelShape:
    """The shape of the model that has these parameters, but for its interaction. Raises CheckpointError."""
    try:
        tables = sorted(int(match[1]) for key in state if (match := re.fullmatch(r"emb_l\.(\d+)\.weight", key)))
        rows = tuple(state[f"emb_l.{table}.weight"].shape[0] for table in range(len(tables)))
        dim = state["emb_l.0.weight"].shape[1]
        return ModelShape(rows, dim, _widths(state, "bot_l"), _widths(state, "top_l"))
    except (KeyError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{path}: has no parameter {error}") from error


def _widths(state: dict[str, Tensor], name: str) -> tuple[int, ...]:
    """Widths of an MLP whose layers are numbered 0, 2, 4, ..."""
    weights: list[Tensor] = []
    while (weight := state.get(f"{name}.{2 * len(weights)}.weight")) is not None:
        weights.append(weight)
    if any(a.shape[0] != b.shape[1] for a, b in pairwise(weights)):
        raise CheckpointError(f"layers of {name} do not fit together")
    return (weights[0].shape[1], *(weight.shape[0] for weight in weights))


if __name__ == "__main__":
    sys.exit(main())
