"""The README is true: its example and its commands run, as they stand or in a short form."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dlrm.data import open_source
from dlrm.options import parse
from tests.dlrm import examples

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def commands() -> list[str]:
    lines = [line.split("  #")[0].rstrip() for block in blocks("sh") for line in block.splitlines()]
    return [line.split(" # ")[0].rstrip() for line in lines if line]


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("alltoall.py", r"rank \d was up to [012] iterations ahead"),
        ("backend.py", r"rank \d of 2 is done; the ranks add up to 1"),
    ],
)
def test_an_example_runs_as_it_stands(script: str, says: str, tmp_path: Path) -> None:
    (example,) = [block for block in blocks("python") if f"# {script}" in block]
    first = example.splitlines()[0]
    assert f"torchrun --nproc-per-node 4 {script}" in first
    (tmp_path / script).write_text(example)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = run([*torchrun, script], tmp_path)
    assert len(re.findall(says, said)) == 2


def test_every_command_is_known_here() -> None:
    """So that a new one in the README gets its short form below."""
    known = (
        "bash ci/",
        "python -m dlrm",
        "torchrun --nproc-per-node 4 -m dlrm",
        "python -m blsrdma",
        "python -m bench",
    )
    assert commands()
    assert [command for command in commands() if not command.startswith(known)] == []
    for command in commands():
        if command.startswith("bash ci/"):
            assert (ROOT / command.split()[1]).is_file(), command


def reads_or_draws(command: str) -> bool:
    """Whether it is there for its data: test_data_commands."""
    return command.startswith("python -m dlrm") and "--ranks" not in command and "--help" not in command


@pytest.mark.parametrize("command", [c for c in commands() if "-m dlrm" in c and not reads_or_draws(c)])
def test_dlrm_commands(command: str, tmp_path: Path) -> None:
    """Short: two ranks and eight batches."""
    words = shlex.split(command)
    if "train.txt" in words:
        row = "1\t" + "\t".join(["3"] * 13) + "\t" + "\t".join(["68fd1e64"] * 26) + "\n"
        (tmp_path / "train.txt").write_text(row * 500)
    for flag in ("--ranks", "--nproc-per-node"):
        if flag in words:
            words[words.index(flag) + 1] = "2"
    if words[0] == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
    else:
        words[0] = sys.executable
    if "--help" not in words and any(flag in words for flag in ("--ranks", "--nproc-per-node")):
        words += ["--num-batches", "8"]
    run(words, tmp_path)
    if "--json" in words:
        assert json.loads((tmp_path / "out.json").read_text())["exact"] is True
    if "--predictions" in words:
        assert len((tmp_path / "scores.csv").read_text().splitlines()) >= 500


def test_data_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finds the reader or generator that it means, and a first batch; without a run's seconds."""
    monkeypatch.chdir(tmp_path)
    examples.all_formats(tmp_path)
    found = {}
    for command in filter(reads_or_draws, commands()):
        words = shlex.split(command)
        assert words[:3] == ["python", "-m", "dlrm"]
        options = parse(words[3:])
        source = open_source(options)
        shape = options.shape(source.table_rows, source.dense_features)
        batch = next(iter(source.batches(2, 1)))
        assert (batch.size, len(batch.indices)) == (2, shape.num_tables), command
        found[command] = type(source).__name__
    assert sorted(found.values()) == sorted(
        ["CriteoFile", "ProcessedNpz", "MlperfBinary", "NpyDays", "AliCsv", "AliMultihot", "AliRaw", "Traces",
         "StackDistance", "Uniform"]
    )  # fmt: skip


def test_info_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "blsrdma", "info"], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert "UCX" in done.stdout
    assert done.returncode in (0, 1)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", TEXT):
        assert (ROOT / target).exists(), target
