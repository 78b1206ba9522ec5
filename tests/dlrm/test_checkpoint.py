from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dlrm import checkpoint
from dlrm.errors import CheckpointError
from dlrm.model import Dense
from dlrm.shape import ModelShape, interaction_width
from dlrm.tables import Tables

SHAPE = ModelShape((5, 6, 7), 4, (3, 4), (interaction_width(3, 4, "dot", False), 1))


def state(seed: int = 9) -> dict[str, Any]:
    modules = (Tables(SHAPE, range(3), seed), Dense(SHAPE, seed))
    return {name: tensor for module in modules for name, tensor in module.state_dict().items()}


def save(path: Path, state_dict: dict[str, Any], **torch_options: Any) -> Path:
    extras = {"epoch": 1, "iter": 7, "train_loss": np.float64(0.5), "test_acc": np.float32(0.8), "nepochs": np.int64(3)}
    torch.save({**extras, "state_dict": state_dict, "opt_state_dict": {}}, path, **torch_options)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_the_layout_of_the_reference_with_numpy_scalars(tmp_path: Path, zipped: bool) -> None:
    path = save(tmp_path / "model.pt", state(), _use_new_zipfile_serialization=zipped)
    tables, dense = Tables(SHAPE, range(1, 3), 1), Dense(SHAPE, 1)
    checkpoint.load(checkpoint.read(path, SHAPE), tables, dense)
    for module in (tables, dense):
        for name, parameter in module.named_parameters():
            assert torch.equal(parameter, state()[name])


def test_every_key_that_does_not_fit_is_named(tmp_path: Path) -> None:
    wrong = state()
    del wrong["emb_l.1.weight"], wrong["bot_l.0.bias"]
    wrong["emb_l.9.weight"] = torch.zeros(1)
    wrong["top_l.0.weight"] = torch.zeros(2, 2)
    wrong["emb_l.0.weight"] = torch.zeros(5, 4, dtype=torch.int64)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.read(save(tmp_path / "model.pt", wrong), SHAPE)
    text = str(caught.value)
    assert "missing emb_l.1.weight, bot_l.0.bias" in text
    assert "extra emb_l.9.weight" in text
    assert "top_l.0.weight is [2, 2], wanted [1, 10]" in text
    assert "emb_l.0.weight is torch.int64" in text


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("code of the checkpoint ran",))


def test_no_code_of_a_checkpoint_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": state(), "train_loss": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        checkpoint.read(tmp_path / "evil.pt", SHAPE)
    assert "code of the checkpoint ran" not in capsys.readouterr().out


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("not a checkpoint")
    (tmp_path / "empty").write_bytes(b"")
    torch.save([1, 2], tmp_path / "list")
    for name in ("text", "empty", "list", "absent"):
        with pytest.raises(CheckpointError, match=name):
            checkpoint.read(tmp_path / name, SHAPE)
