"""torch's own distributed test-suite on a backend of our choice; it ships in torch's wheel and needs `expecttest`.

    python -m tests.backend.torch_suite                             # the all_to_all family on "bls", 4 ranks
    python -m tests.backend.torch_suite all_gather --backend gloo
    python -m tests.backend.torch_suite --families                  # every family, on bls beside gloo

The suite would start processes for every test, 285 times; here one set of ranks runs all tests that were asked for,
each in a group of its own. Which tests apply to a backend the suite decides by name when it is imported: the CPU
all_to_all tests are open for "mpi" alone. So it is imported under another name (`gate`) than it runs with.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
import unittest
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.ranks import run_ranks

FAMILIES = {  # name -> (gate, beginnings of the names of its tests)
    "all_to_all": ("mpi", ["test_all_to_all"]),
    "all_gather": ("gloo", ["test_all_gather", "test_gather"]),
    "all_reduce": ("gloo", ["test_all_reduce"]),
    "broadcast": ("gloo", ["test_broadcast"]),
    "barrier": ("gloo", ["test_barrier"]),
    "reduce": ("gloo", ["test_reduce"]),
    "scatter": ("gloo", ["test_scatter"]),
    "send_recv": ("gloo", ["test_send_recv", "test_isend", "test_irecv", "test_batch_isend"]),
    "new_group": ("gloo", ["test_new_subgroups", "test_new_group", "test_get_rank", "test_get_backend"]),
}
_TEST_TIMEOUT_S = 20  # of every operation of a test
# What tests nothing on a CPU, or is about one backend's own machinery.
_NOT_OURS = ("cuda", "nccl", "multigpu", "_gpu", "sparse")


def run_family(family: str, backend: str, ranks: int = 4, timeout: float = 240.0) -> dict[str, str]:
    """test -> "ok", "skipped: why" or "failed: why", the worst of the ranks."""
    gate, prefixes = FAMILIES[family]
    with tempfile.TemporaryDirectory() as folder:
        environment = {"BACKEND": gate, "TEMP_DIR": folder, "GLOO_SOCKET_IFNAME": "lo"}
        results = run_ranks(_run, ranks, backend, prefixes, env=environment, timeout=timeout)
    outcomes: dict[str, str] = {}
    for result in results:
        for name, outcome in result.value.items():
            outcomes[name] = max(outcomes.get(name, "ok"), outcome, key=_badness)
    return outcomes


def _badness(outcome: str) -> int:
    return ["ok", "skipped", "failed"].index(outcome.split(":")[0])


def _run(rank: int, world: int, store: Any, backend: str, prefixes: list[str]) -> dict[str, str]:
    suite: Any = importlib.import_module("torch.testing._internal.distributed.distributed_test")
    suite.BACKEND = backend
    common = importlib.import_module("torch.testing._internal.common_distributed")
    skips = {skip.exit_code: skip.message for skip in common.TEST_SKIPS.values()}

    class Suite(common.TestCase, suite.DistributedTest._DistTestBase):  # type: ignore[misc, name-defined]
        world_size = world

    Suite.rank = rank
    names = sorted(n for n in dir(Suite) if n.startswith(tuple(prefixes)) and not any(word in n for word in _NOT_OURS))
    folder = Path(os.environ["TEMP_DIR"])
    outcomes = {}
    for name in names:
        for part in ("barrier", "test_dir"):
            (folder / name / part).mkdir(parents=True, exist_ok=True)
        os.environ["TEMP_DIR"] = str(folder / name)  # of the suite's own barrier: a failed test leaves it out of step
        suite.Barrier.barrier_id = 0
        own = dist.PrefixStore(name, store)
        try:
            dist.init_process_group(
                backend, store=own, rank=rank, world_size=world, timeout=timedelta(seconds=_TEST_TIMEOUT_S)
            )
            case = Suite(name)
            case._barrier()
            getattr(case, name)()
            outcomes[name] = "ok"
        except unittest.SkipTest as skip:
            outcomes[name] = f"skipped: {skip}"
        except SystemExit as end:
            outcomes[name] = f"skipped: {skips.get(end.code, end.code)}"
        except Exception as error:
            outcomes[name] = f"failed: {type(error).__name__}: {error}"[:300]
        _meet(own, world)
        if dist.is_initialized():
            dist.destroy_process_group()
    return outcomes


def _meet(store: Any, world: int) -> None:
    store.add("over", 1)
    deadline = time.monotonic() + 2 * _TEST_TIMEOUT_S
    while store.add("over", 0) < world and time.monotonic() < deadline:
        time.sleep(0.02)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", nargs="?", choices=sorted(FAMILIES), default="all_to_all")
    parser.add_argument("--families", action="store_true", help="all of them, beside gloo; 0: as many as on gloo")
    parser.add_argument("--backend", default="bls")
    parser.add_argument("--ranks", type=int, default=4)
    arguments = parser.parse_args()
    bad = 0
    for family in FAMILIES if arguments.families else [arguments.family]:
        columns = {arguments.backend: run_family(family, arguments.backend, arguments.ranks)}
        if arguments.families:
            columns["gloo"] = run_family(family, "gloo", arguments.ranks)
        for backend, outcomes in columns.items():
            passed = [name for name, outcome in outcomes.items() if outcome == "ok"]
            skipped = [name for name, outcome in outcomes.items() if outcome.startswith("skipped")]
            tried = len(outcomes) - len(skipped)
            print(f"{family} on {backend}: {len(passed)} of {tried} pass, {len(skipped)} skipped", flush=True)
            for name, outcome in outcomes.items():
                if outcome.startswith("failed"):
                    print(f"    {name} {outcome}")
                    # What gloo fails as well is no fault of ours, but for the family that is ours.
                    excused = family != "all_to_all" and columns.get("gloo", {}).get(name, "ok") != "ok"
                    bad += backend == arguments.backend and not excused
    return bad > 0


if __name__ == "__main__":
    os.environ.setdefault("RES_OPTIONS", "timeout:1")
    sys.exit(main())
