"""`python -m bench gpu`: tables and messages in GPU memory, next to what a copy there reaches and to peers."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from bench import environment
from bench.gpu import dlrm, exchange, lookup, report
from bench.gpu.effort import QUICK, Effort
from bench.launchers import Unavailable
from bench.publish import add_options, publish
from bench.team import TeamFailed

ABOUT = """\
Measure on a real GPU, in three parts, each in processes of its own:

  lookup     pooled lookups, with all rows in GPU memory and in two tiers; torch.nn.EmbeddingBag, FBGEMM
  exchange   all-to-all between 2 and 4 ranks on one GPU, by CUDA IPC and staged through host memory, with and without
             MPS; gloo, MPI and NCCL
  dlrm       MLPerf v1's model; the dense part, and lookups with exchange, each alone; under delays

Values are compared, every bit, before and after the timed parts. Repetitions go round the systems.
"""
EXAMPLES = """\
examples:
  bash ci/gpu                                    tests and all of this, where a GPU is
  python -m bench gpu lookup --quick             a first look
  python -m bench gpu --json out/gpu.json --document docs/gpu.md    what the document shows

Each part writes what it has when it is done; a file of --json keeps the other parts of earlier runs.
"""
PARTS = ("lookup", "exchange", "dlrm")
SIMULATED = "Simulated"  # how the names of devices begin that are none (tests/gpu/simulated)
Keep = Callable[[dict[str, Any]], None]


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "gpu", help="tables and messages in GPU memory", description=ABOUT, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run=run)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (all)")
    parser.add_argument("--quick", action="store_true", help="little time, little memory")
    parser.add_argument("--repeat", type=int, help="rounds (7; 3 with --quick)")
    parser.add_argument(
        "--ranks", type=int, nargs="+", help="of the exchange; the first number also of the model (2 4)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything, and keep other parts in it")
    add_options(parser, "gpu")


def run(options: argparse.Namespace) -> int:
    """Exit status 1 when a part failed, 0 with one line where there is no GPU, 2 for an unknown part."""
    if unknown := [part for part in options.parts if part not in PARTS]:
        print(f"bench gpu: no part {unknown[0]!r}: there are {', '.join(PARTS)}", file=sys.stderr)
        return 2
    from blsrdma.gpu.device import unavailable

    if why := unavailable():
        print(f"bench gpu: nothing ran: {why}")
        return 0
    effort = QUICK if options.quick else Effort()
    if options.repeat:
        effort = replace(effort, repeat=options.repeat, runs=options.repeat)
    if options.ranks:
        effort = replace(effort, ranks=tuple(options.ranks))
    return measure(options, effort)


def measure(options: argparse.Namespace, effort: Effort) -> int:
    """The chosen parts, one after the other: one that fails does not stop the next."""
    results: dict[str, Any] = {"parts": {}}
    if options.json and options.json.exists():
        results = json.loads(options.json.read_text())
    command, failed = f"python -m bench gpu {' '.join(sys.argv[2:])}".strip(), False
    for name in options.parts or PARTS:
        facts, began = environment.describe(), time.monotonic()
        for warning in environment.disturbed(facts["busy_before"]):
            print(warning, file=sys.stderr)

        def keep(found: dict[str, Any], name: str = name, facts: Any = facts, began: float = began) -> None:
            results["parts"][name] = found | {
                "environment": facts,
                "seconds": time.monotonic() - began,
                "command": command,
            }
            _write(options.json, results)

        try:
            keep(_PARTS[name](effort, partial(print, flush=True), keep))
        except (TeamFailed, Unavailable) as error:  # what it had told before stays
            print(f"bench gpu: {name} failed: {error}", file=sys.stderr)
            failed = True
        except SystemExit:  # told to end
            _publish(options, command, results["parts"])
            raise
        failed |= not _publish(options, command, results["parts"])
    return int(failed)


def _publish(options: argparse.Namespace, command: str, parts: dict[str, Any]) -> bool:
    """Show what there is; False where it was not put into the document that was named."""
    devices = [part.get("device", {}).get("name", "") for part in parts.values()]
    refused = options.document and any(name.startswith(SIMULATED) for name in devices)
    if refused:
        print("bench gpu: numbers of a simulated GPU mean nothing: the document stays as it is", file=sys.stderr)
        options.document = None
    if parts:
        publish(options, command, report.about(parts), report.tables(parts))
    return not refused


_PARTS: dict[str, Callable[[Effort, Callable[[str], None], Keep], dict[str, Any]]] = {
    "lookup": lookup.measure, "exchange": exchange.measure, "dlrm": dlrm.measure,
}  # fmt: skip


def _write(path: Path | None, results: dict[str, Any]) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_file = path.with_suffix(".partial")
        partial_file.write_text(json.dumps(results) + "\n")
        partial_file.replace(path)


__all__ = ["PARTS", "add", "measure", "run"]
