"""What only an installed package has: torch finds "bls" by its entry points, with no import of ours."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest

GROUPS = ("torch.backends", "torch.distributed.backends")
if not all(any(e.name == "bls" for e in entry_points(group=group)) for group in GROUPS):
    pytest.skip("blsrdma is not installed with its entry points", allow_module_level=True)

SCRIPT = """
import sys, torch, torch.distributed as dist
assert not any(name.startswith(("ucxx", "libucx", "blsrdma._native")) for name in sys.modules)
dist.init_process_group("bls")
output = torch.empty(2)
dist.all_to_all_single(output, torch.full((2,), float(dist.get_rank())))
assert output.tolist() == [0, 1]
dist.destroy_process_group()
"""


def run(tmp_path, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_no_import_needed(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    run(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "script.py", OMP_NUM_THREADS="1")


def test_registering_twice(tmp_path):
    twice = f"""
import torch
from importlib.metadata import entry_points
for group in {GROUPS!r}:
    for entry in entry_points(group=group):
        if entry.name == "bls":
            entry.load()()
assert torch.distributed.Backend.backend_list.count("bls") == 1
assert torch.distributed.Backend.default_device_backend_map["cpu"] == "gloo"
"""
    run(tmp_path, "-c", twice)


def test_torch_is_imported_whatever_happens(tmp_path):
    """A torch in which registering fails, or that has no distributed package."""
    broken = """
import sys, types
import torch, torch.distributed as dist
from blsrdma.backend import register
dist.Backend.backend_list.remove("bls")
dist.Backend.register_backend = None
register()
dist.is_available = lambda: False
register()
sys.modules["torch.distributed"] = None
register()
"""
    run(tmp_path, "-c", broken)
