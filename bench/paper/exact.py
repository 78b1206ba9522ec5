"""That results are the same bits whatever brings them, and how good they are: a model that was fitted, where the data
are given."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.launchers import ROOT
from bench.paper.dlrm import System, Teams, systems
from bench.paper.workloads import BALANCED

NAME = "exact"
_SMALL = "--arch-sparse-feature-size 8 --arch-mlp-bot 13-64-8 --arch-mlp-top 64-1 --dense-block 32".split()
_BATCH = "--mini-batch-size 256".split()
_FITTED = 6400
DELAYS = ("none", "exp:p=0.2,mean=2ms", "rotate:every=3,time=3ms")


def flags(data: Path | None, folder: Path, epochs: int) -> tuple[list[str], str]:
    """Of the model, and what it is in words. Fits it first, where there are data."""
    file = data / "criteo_kaggle_first8000.tsv.gz" if data else None
    if file is None or not file.exists():
        return [*_SMALL, *_BATCH, "--data-generation", "sample"], "generated samples, weights drawn: no AUC to speak of"
    model = folder / "fitted.pt"
    command = [sys.executable, "-m", "dlrm.fit", "--raw-data-file", str(file), "--samples", str(_FITTED),
               "--nepochs", str(epochs), "--save-model", str(model)]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    rest = ["--raw-data-file", str(file), "--data-set", "kaggle", "--first-sample", str(_FITTED)]
    about = f"fitted to {_FITTED:,} rows of Criteo Kaggle, {epochs} epochs; scored on the 1,600 rows behind them"
    return [*_SMALL, *_BATCH, *rest, "--load-model", str(model)], about


def measure(teams: Teams, model: list[str], about: str, lags: list[int]) -> dict[str, Any]:
    """Digests and AUC of every system under every plan of delays, and of one process."""
    name = "exact"
    teams.load(f"{name}/model", model)
    teams.call("bls", "bench.paper.dlrm_rank:load", name=f"{name}/alone", flags=model, alone=True, limit=300.0)
    runs: list[dict[str, Any]] = []

    def keep(system: str, delay: str, reply: dict[str, Any]) -> None:
        wanted = ("auc", "pooled_sha256", "logits_sha256", "samples")
        runs.append({"system": system, "delay": delay, **{key: reply[key] for key in wanted}})

    keep("1 process", "none", teams.alone(name, 1, digest=True)[0])
    for system in _systems(teams, lags):
        for delay in DELAYS:
            reply = teams.serve(system, name, {"digest": True, "delay": delay})[0]
            keep(system.name, delay, reply)
    return {"runs": runs, "about": about}


def _systems(teams: Teams, lags: list[int]) -> list[System]:
    return [one for one in systems(BALANCED, lags) if one.digests and teams.has(one.runtime)]
