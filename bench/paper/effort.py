"""How much is measured: in hours, in minutes (--quick), or just enough to see that everything runs (--trial)."""

from __future__ import annotations

from dataclasses import dataclass, field

from bench import delays
from bench.cases import IRREGULAR

EXPONENTIAL = "exp:p=0.1,mean=2ms"  # of the synthetic part
MAIN_LOAD = 0.7  # that a goal is about


@dataclass(frozen=True)
class Synthetic:
    """Of bench.paper.synthetic."""

    ranks: list[int] = field(default_factory=lambda: [2, 4, 8])
    lags: list[int] = field(default_factory=lambda: [0, 1, 2, 4, 8, 16])
    irregular_lags: list[int] = field(default_factory=lambda: [0, 8])
    plans: list[str] = field(default_factory=lambda: list(delays.PLANS))
    irregular: list[str] = field(default_factory=lambda: list(IRREGULAR))
    systems: list[str] = field(default_factory=lambda: list(delays.SYSTEMS))
    repeat: int = 5
    seconds: float = 0.25
    iterations: int = 500
    exponential_iterations: int = 500  # the longer, the less a run's beginning and end weigh
    again: int = 60


@dataclass(frozen=True)
class Dlrm:
    """Of bench.paper.dlrm. delays: means, in undelayed iterations."""

    ranks: int = 4
    lags: list[int] = field(default_factory=lambda: [0, 1, 2, 4, 8, 16])
    batches: int = 300
    repeat: int = 9
    more_repeat: int = 9  # of workloads but the first, as the next but one
    delays: list[float] = field(default_factory=lambda: [1, 5, 20])
    more_delays: list[float] = field(default_factory=lambda: [1, 5, 20])
    delayed_batches: int = 150
    delayed_repeat: int = 5
    loads: list[float] = field(default_factory=lambda: [0.5, 0.7, 0.9])
    open_batches: int = 1500
    open_repeat: int = 3  # at loads below MAIN_LOAD and above; there twice as many
    again: int = 60


@dataclass(frozen=True)
class Where:
    """Of bench.paper.where. means: of the delays, in units of the work between two exchanges."""

    ranks: list[int] = field(default_factory=lambda: [2, 4, 8])
    lags: list[int] = field(default_factory=lambda: [0, 1, 4, 16])
    means: list[float] = field(default_factory=lambda: [1, 5, 20])
    iterations: int = 400
    repeat: int = 3
    simulated_ranks: list[int] = field(default_factory=lambda: [2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
    simulated_iterations: int = 1000
    again: int = 30


@dataclass(frozen=True)
class Effort:
    """Of a whole run."""

    name: str = "full"
    synthetic: Synthetic = field(default_factory=Synthetic)
    dlrm: Dlrm = field(default_factory=Dlrm)
    where: Where = field(default_factory=Where)
    fit_epochs: int = 3


FULL = Effort()
QUICK = Effort(
    "quick",
    Synthetic([4], [0, 8], [8], repeat=3, seconds=0.05, iterations=120, exponential_iterations=500, again=20),
    Dlrm(lags=[0, 2, 8], batches=100, repeat=7, more_repeat=5, more_delays=[5], delayed_batches=60, delayed_repeat=3,
         open_batches=250, open_repeat=1, again=8),
    Where(lags=[0, 4, 16], iterations=150, repeat=2, simulated_iterations=400, again=10),
)  # fmt: skip
TRIAL = Effort(
    "trial",
    Synthetic([2], [0, 2], [2], ["none", "exp:p=0.2,mean=300us"], ["zipf"], ["bls", "gloo", "gloo-nb"], 2, 0.01, 20,
              20, 0),
    Dlrm(2, [0, 2], 4, 2, 2, [5], [], 6, 2, [MAIN_LOAD], 10, 1, 0),
    Where([2], [0, 2], [5], 20, 2, [2, 8], 30, 0),
    1,
)  # fmt: skip
EFFORTS = {effort.name: effort for effort in (FULL, QUICK, TRIAL)}
