"""`python -m dlrm.demo --out out/`: four ranks serve the embedded sample with several lags, without and with delays.

Every run is verified bit by bit against a single process. Prints one table and draws OUT/demo.png.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from blsrdma import spawn
from dlrm.__main__ import guarded
from dlrm.errors import NotExact
from dlrm.options import parse

if TYPE_CHECKING:
    from collections.abc import Sequence

    from dlrm.report import Report

RANKS = 4
LAGS = (0, 1, 2, 4)
DELAYS = ("none", "exp:p=0.3,mean=2ms")
ROUNDS = 3
RUN = ("--verify", "--dense-block=32", "--mini-batch-size=256", "--arch-mlp-bot=13-64-16", "--arch-mlp-top=64-1")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo; 0, or 1 after an error or where a bit differs."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m dlrm.demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), metavar="DIR", help="folder for the picture (out)")
    parser.add_argument("--num-batches", type=int, default=250, metavar="N", help="batches of each run (250)")
    given = parser.parse_args(arguments)
    if "RANK" in os.environ:
        rank = int(os.environ["RANK"])
        return guarded(f"rank {rank}", lambda: run_rank(rank, given.out, given.num_batches), debug=False)
    print(f"{RANKS} ranks, lags {', '.join(map(str, LAGS))}, without and with delays ({DELAYS[1]}) ...", flush=True)
    return guarded("demo", lambda: spawn.launch("dlrm.demo", arguments, RANKS), debug=False)


def run_rank(rank: int, out: Path, num_batches: int) -> None:
    """Be a rank: all runs, one after another; rank 0 shows and draws. Raises NotExact where a bit differs."""
    spawn.die_with_launcher()
    from blsrdma.rendezvous import store_from_environment
    from dlrm.worker import Worker

    worker = Worker(parse([*RUN, "--num-batches", str(num_batches)]), rank, RANKS)
    store = store_from_environment(rank, RANKS)
    found: dict[tuple[str, int], list[Report]] = {(delay, lag): [] for delay in DELAYS for lag in LAGS}
    for turn in range(ROUNDS):  # in turns, so that what else the machine does disturbs all settings alike
        for (delay, lag), reports in found.items():
            report = worker.run(store, f"demo/{turn}/{delay}/{lag}", lag=lag, delay=delay)
            if report is not None:
                reports.append(report)
    if rank != 0:
        return
    chosen = [_median(reports) for reports in found.values()]
    _show(chosen)
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps([report.values for report in chosen], indent=2) + "\n")
    print(f"all numbers: {out / 'demo.json'}")
    try:
        from dlrm.figure import draw
    except ModuleNotFoundError as missing:
        print(f"no picture: {missing.name} is not installed; pip install 'blsrdma[demo]' brings it")
        return
    draw(chosen, out / "demo.png")
    print(f"picture: {out / 'demo.png'}")


def _median(reports: list[Report]) -> Report:
    """The run of median throughput, of repeated ones. Raises NotExact where a bit of any of them differs."""
    for report in reports:
        if report.difference:
            raise NotExact(f"lag {report.values['lag']}: {report.difference}")
    return sorted(reports, key=lambda report: float(report.values["samples_per_s"]))[len(reports) // 2]


def _show(reports: list[Report]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"DLRM inference, {RANKS} ranks, one-sided puts, bounded lag", title_justify="left")
    for name in ("delays", "lag", "samples/s", "ms/iter", "floor", "p99 ms", "max lead", "exact"):
        table.add_column(name, justify="left" if name == "delays" else "right")
    previous = None
    for report in reports:
        values = report.values
        delay = values["settings"]["delay"]
        if previous not in (None, delay):
            table.add_section()
        table.add_row(
            "" if delay == previous else "none" if delay == "none" else "random",
            str(values["lag"]),
            f"{values['samples_per_s']:,.0f}",
            f"{values['ms_per_iteration']:.2f}",
            f"{values['floor_ms'] / values['batches']:.2f}",
            f"{values['latency_ms']['p99']:.1f}",
            str(values["max_lead_seen"]),
            "yes" if values["exact"] else "[bold red]NO[/]",
        )
        previous = delay
    Console().print(table)
    print(
        "floor: the ms/iter that the lag bound allows, given each rank's work and delays as they were in that run,\n"
        "were the exchange free (max-plus model). exact: pooled vectors, logits and probabilities are, bit by bit,\n"
        f"those of a single process. Of {ROUNDS} runs the one of median throughput is shown."
    )
    cores = len(os.sched_getaffinity(0))
    if cores < RANKS:
        print(f"{RANKS} ranks share {cores} cores here: they also wait for a core, which the floor does not know of.")
    digests = {(report.values["pooled_sha256"], report.values["logits_sha256"]) for report in reports}
    if len(digests) == 1:
        pooled, logits = digests.pop()
        print(f"all runs: pooled_sha256 {pooled[:16]}..., logits_sha256 {logits[:16]}...")


if __name__ == "__main__":
    sys.exit(main())
