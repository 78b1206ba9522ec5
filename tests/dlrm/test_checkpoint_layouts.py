"""Checkpoints other than the reference's single file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dlrm import checkpoint, convert, kernels, safetensors, sharded
from dlrm.errors import CheckpointError, OptionError
from dlrm.model import Dense
from dlrm.placement import Piece, split
from dlrm.shape import ModelShape, interaction_width
from dlrm.tables import Tables

SHAPE = ModelShape((5, 6, 7, 8, 9), 4, (3, 4), (interaction_width(5, 4, "dot", False), 6, 1))


def state(seed: int = 9) -> dict[str, Any]:
    modules = (Tables(SHAPE, range(5), seed), Dense(SHAPE, seed))
    return {name: tensor for module in modules for name, tensor in module.state_dict().items()}


def assert_loads(path: Path | str, owned: list[int | Piece] | None = None) -> None:
    tables, dense = Tables(SHAPE, owned or [1, 4], None), Dense(SHAPE, 1)
    checkpoint.load(checkpoint.read(path, SHAPE), tables, dense)
    for module in (tables, dense):
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter, state()[name]), name


def distributed(folder: Path, ranks: int, dense_seed: int | None = None) -> list[Path]:
    """What the ranks of the reference's distributed run save: own tables from 0, and MLPs wrapped by DDP."""
    whole, files = state(), []
    for rank, tables in enumerate(split(5, ranks)):
        part = {f"emb_l.{own}.weight": whole[f"emb_l.{table}.weight"] for own, table in enumerate(tables)}
        dense = state(dense_seed) if dense_seed is not None and rank == 1 else whole
        for name, value in dense.items():
            if not name.startswith("emb_l"):
                part[name.replace("_l.", "_l.module.", 1)] = value
        files.append(folder / f"rank_{rank}.pt")
        torch.save({"state_dict": part, "epoch": 0}, files[-1])
    return files


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_the_files_of_a_distributed_run(tmp_path: Path, ranks: int) -> None:
    files = distributed(tmp_path, ranks)
    assert_loads(",".join(map(str, files)))
    assert_loads(tmp_path)


def test_ranks_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for file in distributed(tmp_path, 5):
        number = int(file.stem.split("_")[1])
        file.rename(tmp_path / f"rank_{number + 8}.pt")  # 8, 9, 10, ...
    assert_loads(tmp_path)


def test_parts_that_are_not_of_one_run(tmp_path: Path) -> None:
    files = distributed(tmp_path, 2, dense_seed=4)
    with pytest.raises(CheckpointError, match=r"bot_l.0.weight of rank_1.pt is not the one of rank_0.pt"):
        checkpoint.read(tmp_path, SHAPE)
    with pytest.raises(CheckpointError, match=r"rank_1.pt has tables \[0, 1\], wanted 3 of them"):
        checkpoint.read(f"{files[1]},{files[0]}", SHAPE)


def test_safetensors_in_one_file_and_in_several(tmp_path: Path) -> None:
    whole = state()
    safetensors.write(tmp_path / "model.safetensors", whole)
    assert_loads(tmp_path / "model.safetensors")
    folder = tmp_path / "parts"
    folder.mkdir()
    names = list(whole)
    safetensors.write(folder / "a.safetensors", {name: whole[name] for name in names[::2]})
    safetensors.write(folder / "b.safetensors", {name: whole[name].half() for name in names[1::2]})
    read = checkpoint.read(folder, SHAPE)
    assert read[names[1]].dtype == torch.float16
    safetensors.write(folder / "c.safetensors", {names[0]: whole[names[0]]})
    with pytest.raises(CheckpointError, match=f"c.safetensors: has {names[0]}, which an earlier file has, too"):
        checkpoint.read(folder, SHAPE)


def test_the_format_is_that_of_the_safetensors_package(tmp_path: Path) -> None:
    theirs = pytest.importorskip("safetensors.torch", reason="the package safetensors is not installed")
    values = state() | {
        "count": torch.tensor(7),
        "none": torch.empty(0, 3),
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    theirs.save_file(values, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    safetensors.write(tmp_path / "ours.safetensors", values)
    ours, back = safetensors.read(tmp_path / "theirs.safetensors"), theirs.load_file(tmp_path / "ours.safetensors")
    assert ours.keys() == back.keys() == values.keys()
    for name, value in values.items():
        assert torch.equal(ours[name], value)
        assert torch.equal(back[name], value)
        assert ours[name].dtype == back[name].dtype == value.dtype


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ({"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, "bytes 0 to 4 of 8 are not"),
        ({"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}, "bytes 4 to 12 of 8 are not"),
        ({"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}, "are not"),
        ({"dtype": "PICKLE", "shape": [2], "data_offsets": [0, 8]}, "the entry of w is not understood"),
        ({"shape": [2]}, "the entry of w is not understood"),
        (7, "the entry of w is not understood"),
    ],
)
def test_a_lying_safetensors_header(tmp_path: Path, entry: Any, says: str) -> None:
    header = json.dumps({"w": entry}).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(CheckpointError, match=says):
        safetensors.read(path)
    path.write_bytes((1 << 60).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="is no safetensors file"):
        safetensors.read(path)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_our_own_layout_holds_what_the_converter_was_given(tmp_path: Path, bits: kernels.Bits) -> None:
    torch.save({"state_dict": state()}, tmp_path / "model.pt")
    assert convert.convert(str(tmp_path / "model.pt"), tmp_path / "own", bits) == SHAPE
    names = sorted(file.name for file in (tmp_path / "own").iterdir())
    assert names == ["dense.safetensors", *[f"emb_l.{table:05d}.safetensors" for table in range(5)], "model.json"]
    kernel = kernels.choose(bits)
    got = Tables(SHAPE, [0, Piece(3, range(2, 6))], None, kernel)
    got.load(checkpoint.read(tmp_path / "own", SHAPE))
    wanted = Tables(SHAPE, [0, Piece(3, range(2, 6))], 9, kernel)
    for (name, ours), theirs in zip(got.named_parameters(), wanted.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    if bits == 32:
        assert_loads(tmp_path / "own", [0, 2])
    with pytest.raises(OptionError, match="is there already"):
        convert.convert(str(tmp_path / "model.pt"), tmp_path / "own", bits)


def test_quantised_rows_become_floats_where_floats_are_wanted(tmp_path: Path) -> None:
    sharded.write(tmp_path / "own", state(), 8)
    tables = Tables(SHAPE, [4], None)
    tables.load(checkpoint.read(tmp_path / "own", SHAPE))
    kernel = kernels.choose(8)
    wanted = kernel.decode(kernel.encode(state()["emb_l.4.weight"]), 4)
    assert torch.equal(tables.get_parameter("emb_l.4.weight"), wanted)


def test_a_rank_opens_only_what_it_reads(tmp_path: Path) -> None:
    """Rows are mapped: the bytes of other tables are not looked at, even where they are rubbish."""
    sharded.write(tmp_path / "own", state())
    path = tmp_path / "own" / "emb_l.00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-4:] = b"\xff\xff\xff\x7f"  # not a number
    path.write_bytes(bytes(data))
    assert_loads(tmp_path / "own", [0, 1, 3])
    tables = Tables(SHAPE, [2], None)
    tables.load(checkpoint.read(tmp_path / "own", SHAPE))
    assert bool(tables.get_parameter("emb_l.2.weight").isnan().any())


def test_a_damaged_layout(tmp_path: Path) -> None:
    sharded.write(tmp_path / "own", state())
    manifest = tmp_path / "own" / "model.json"
    whole = json.loads(manifest.read_text())
    (tmp_path / "own" / "emb_l.00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="emb_l.00002"):
        checkpoint.read(tmp_path / "own", SHAPE)
    for change, says in (
        ({"version": 9}, "version 9, wanted blsrdma-dlrm 1"),
        ({"files": {"emb_l.0.weight": "../x"}}, "is not a file of this folder"),
        ({"files": {"emb_l.7.weight": "dense.safetensors"}}, "no file has emb_l.7.weight"),
        ({"files": 5}, "cannot be read"),
    ):
        manifest.write_text(json.dumps(whole | change))
        with pytest.raises(CheckpointError, match=says):
            checkpoint.read(tmp_path / "own", SHAPE)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CheckpointError, match="holds no model.json"):
        checkpoint.read(tmp_path / "nothing", SHAPE)
