"""An all-to-all alone: regular and irregular sizes, delays of all kinds, each lag, next to the peers and the model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from bench import measuring
from bench.cases import Case
from bench.harness import Effort as Blocks
from bench.launchers import Interpreters
from bench.paper.effort import EXPONENTIAL, Synthetic
from bench.paper.folder import Arrays
from bench.results import Results

SIZE = "64K"
NAME = "synthetic"


def cases(effort: Synthetic) -> list[Case]:
    """All plans of delays for messages of one size; none and the exponential ones for irregular messages."""
    some = [plan for plan in effort.plans if plan == "none" or plan.startswith("exp:")]
    kinds = [(SIZE, effort.lags, effort.plans), *((kind, effort.irregular_lags, some) for kind in effort.irregular)]
    return [
        Case(ranks, size, lag, delay=plan)
        for ranks in effort.ranks for size, lags, plans in kinds for plan in plans for lag in lags
    ]  # fmt: skip


def measure(
    effort: Synthetic, interpreters: Interpreters, unfinished: Path, environment: dict[str, Any], command: str
) -> Results:
    """Everything; what `unfinished` has of the same effort and commit is kept, and each case added to it."""
    blocks = Blocks(
        effort.repeat, effort.seconds, effort.iterations, {EXPONENTIAL: effort.exponential_iterations}, effort.again
    )
    return measured(cases(effort), effort.systems, blocks, interpreters, unfinished, environment, command, NAME)


def measured(
    wanted: list[Case], systems: list[str], blocks: Blocks, interpreters: Interpreters, unfinished: Path,
    environment: dict[str, Any], command: str, label: str,
) -> Results:  # fmt: skip
    """The cases by the harness, resumed from a file of the same options and commit, which is gone in the end."""
    options = {"systems": systems, "blocks": asdict(blocks)}
    results = Results(command, options, dict(environment))
    if unfinished.exists():
        earlier = Results.load(unfinished)
        if earlier.options == options and earlier.environment["commit"] == environment["commit"]:
            results = earlier
    measuring.measure(results, wanted, systems, blocks, interpreters, unfinished, label=label)
    unfinished.unlink(missing_ok=True)
    return results


def arrays(results: Results) -> Arrays:
    """Raw samples, ns per iteration, and for delayed cases ns slept: [repetition, rank, iteration]."""
    found: Arrays = {}
    for number, m in enumerate(results.measurements):
        found[f"{number}/samples"] = np.array([sample for one in m.samples for sample in one])
        if m.stalls:
            found[f"{number}/slept"] = np.stack([m.slept(one) for one in range(len(m.samples))])
    return found
