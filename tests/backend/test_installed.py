"""torch finds "bls" by the package's entry points, with no import of ours, and is never hurt by them."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import entry_points

GROUPS = ("torch.backends", "torch.distributed.backends")


def run(tmp_path, *arguments, **environment):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=tmp_path, env={**os.environ, **environment}, capture_output=True, text=True,
        timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_both_groups_name_it():
    for group in GROUPS:
        assert [e.value for e in entry_points(group=group) if e.name == "bls"] == ["blsrdma.backend:register"], group


SCRIPT = """
import os, sys, torch, torch.distributed as dist
assert not any(name.startswith(("ucxx", "libucx", "blsrdma._native")) for name in sys.modules)
dist.init_process_group("bls")
output = torch.empty(2)
dist.all_to_all_single(output, torch.full((2,), float(dist.get_rank())))
os.write(1, f"got {output.tolist()}\\n".encode())  # at once, for both ranks write into one pipe
dist.destroy_process_group()
"""


def test_no_import_needed(tmp_path):
    """Under torchrun, whose environment is where env:// looks."""
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    assert run(tmp_path, *torchrun, "script.py", OMP_NUM_THREADS="1").count("got [0.0, 1.0]\n") == 2


TWICE = f"""
from importlib.metadata import entry_points
for group in {GROUPS!r}:
    for entry in entry_points(group=group):
        if entry.name == "bls":
            entry.load()()
assert dist.Backend.backend_list.count("bls") == 1
assert dist.Backend.default_device_backend_map["cpu"] == "gloo"
"""
# What `import torch` must survive, were it to meet it: a torch in which registering fails, or without distributed.
BROKEN = """
from blsrdma.backend import register
dist.Backend.backend_list.remove("bls")
dist.Backend.register_backend = None
register()
dist.is_available = lambda: False
register()
sys.modules["torch.distributed"] = None
register()
"""
BEGIN = "import sys, torch, torch.distributed as dist\n"


def test_registering_twice_or_in_vain(tmp_path):
    run(tmp_path, "-c", BEGIN + TWICE + BROKEN)


WITHOUT_UCXX = """
from importlib.machinery import PathFinder
found = PathFinder.find_spec
missing = ("ucxx", "libucxx", "libucx")
PathFinder.find_spec = lambda name, *a: None if name.split(".")[0] in missing else found(name, *a)
import torch, torch.distributed as dist
assert "bls" in dist.Backend.backend_list
store = dist.HashStore()
try:
    dist.init_process_group("bls", store=store, rank=0, world_size=1)
except ImportError as error:
    print(error)
dist.init_process_group("gloo", store=store, rank=0, world_size=1)
dist.barrier()
"""


def test_without_ucxx_torch_is_as_ever(tmp_path):
    assert "blsrdma needs ucxx: pip install" in run(tmp_path, "-c", WITHOUT_UCXX)
